"""What a trace says of the device: how long it worked in a step, at how many kernels, and how often the host waited for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a Chrome trace of torch.profiler
WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")  # calls of CUDA's, HIP's and XPU's run time


@dataclass(frozen=True)
class DeviceTime:
    """What the device did in a step, on average."""

    busy: float  # seconds in which anything ran on it
    kernels: float  # how many
    waits: float  # calls by which the host waited for it


def device_time(trace: Path, steps: int) -> DeviceTime:
    """Read a Chrome trace of so many steps."""
    events = json.loads(trace.read_text())["traceEvents"]
    return device_time_of(events, steps)


def device_time_of(events: Iterable[Mapping[str, Any]], steps: int) -> DeviceTime:
    """Sum up the events of a trace, whose times are in microseconds."""
    spans, kernels, waits = [], 0, 0
    for event in events:
        if event.get("cat") in ON_DEVICE and event.get("ph") == "X":
            spans.append((event["ts"], event["ts"] + event["dur"]))
            kernels += event["cat"] == "kernel"
        elif event.get("cat") == "cuda_runtime":
            waits += str(event.get("name")).endswith(WAITS)
    return DeviceTime(covered(spans) / 1e6 / steps, kernels / steps, waits / steps)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how much of a line spans cover, where they overlap once."""
    total, end = 0.0, float("-inf")
    for since, until in sorted(spans):
        total += max(0.0, until - max(since, end))
        end = max(end, until)
    return total
