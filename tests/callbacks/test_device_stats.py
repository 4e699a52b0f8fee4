"""DeviceStats: what is logged on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

import sheer
from tests.task import loader, step, trainer


def logged(callback: sheer.DeviceStats, device: str) -> dict[str, float]:
    net = nn.Linear(6, 1)
    trainer(callbacks=[callback], max_epochs=1, run_dir="run", device=device).fit(
        net, step, loader(), optimizer=SGD(net.parameters(), lr=0.01)
    )
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in line.items() if name.startswith(("device/", "host/"))}


def test_the_host() -> None:
    line = logged(sheer.DeviceStats(), "cpu")
    assert list(line) == ["host/cpu_percent", "host/memory_percent", "host/process_memory_gib"]
    assert 0 <= line["host/memory_percent"] <= 100 and line["host/process_memory_gib"] > 0.05


def test_without_the_host_and_an_accelerator_there_is_nothing() -> None:
    assert logged(sheer.DeviceStats(host=False), "cpu") == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_accelerator() -> None:
    line = logged(sheer.DeviceStats(host=False), "cuda")
    assert line["device/memory_peak_gib"] >= line["device/memory_gib"] > 0
    if torch.version.cuda:
        assert line["device/power_watts"] > 1
