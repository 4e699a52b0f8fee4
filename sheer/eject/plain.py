"""Plain twins of what the library does with more care: same arguments, same numbers, same files, fewer words.

An ejected script gets these in place of their originals, where what sets those apart is not needed by it; tests hold each to its
original, value for value. Where a script needs more, the original is written out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from sheer.data.order import mix_seed
from sheer.events import RunInfo
from sheer.metrics import Mean


class PlainMetrics:
    """Weighted means of what steps return; adding one does not wait for the device, reading them does."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[Any, Any, bool]]] = {}

    def add(self, output: Any, samples: int, prefix: str = "") -> None:
        """Add what a step returned for a batch of `samples`: a loss, or a dict of metrics."""
        for name, value in output.items() if isinstance(output, Mapping) else [("loss", output)]:
            row = (value.total, value.count, False) if isinstance(value, Mean) else (value, samples, True)
            self.values.setdefault(prefix + name, []).append(row)

    def read(self) -> dict[str, float]:
        """Return the means, and start anew."""
        means = {}
        for name, rows in self.values.items():
            total = weight = 0.0
            for value, count, is_mean in rows:
                total += float(value) * float(count) if is_mean else float(value)
                weight += float(count)
            means[name] = total / weight if weight else float("nan")
        self.values.clear()
        return means


class PlainWatch:
    """Losses and norms on the device, tested together."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, Tensor]] = []

    def add(self, step: int, what: str, value: Tensor) -> None:
        """Keep a scalar to be tested."""
        self.seen.append((step, what, value.detach()))

    def check(self) -> None:
        """Raise an error that names the first value since the last check that was NaN or infinite."""
        seen, self.seen = self.seen, []
        for step, what, value in seen:
            if not value.isfinite():
                raise FloatingPointError(f"The {what} became NaN or infinite at step {step}.")


class PlainJSONL:
    """Appends the metrics to `metrics.jsonl`, a line each time."""

    def __init__(self) -> None:
        self.size = 0

    def start(self, info: RunInfo) -> None:
        """Open the file, without what came after the checkpoint that was restored."""
        self.file = (info.run_dir / "metrics.jsonl").open("a")
        self.file.truncate(self.size)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
        self.file.flush()
        self.size = self.file.tell()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class PlainSampler(Sampler[int]):
    """The indices of an epoch from sample `start` on, in an order that depends on the seed and the epoch alone."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        yield from torch.randperm(self.size, generator=generator)[self.start :].tolist()


def plain_loader(loader: DataLoader[Any], sampler: PlainSampler) -> DataLoader[Any]:
    """Return a loader of the same data in the order of a sampler."""
    return DataLoader(
        loader.dataset,
        loader.batch_size,
        sampler=sampler,
        drop_last=loader.drop_last,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
    )


def console_line(step: int, metrics: Mapping[str, float]) -> None:
    """Print metrics in a line."""
    print(f"step {step:,} · " + " · ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)


def plain_run_dir(script: str) -> Path:
    """Return a new folder for a run, named by the time."""
    path = Path("runs") / script / time.strftime("%Y-%m-%d_%H-%M-%S")
    path.mkdir(parents=True)
    return path
