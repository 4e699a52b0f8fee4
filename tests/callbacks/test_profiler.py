"""Profiler: files that Perfetto and TensorBoard read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD

import sheer
from tests.task import loader, step, trainer


def fitted(profiler: sheer.Profiler, step: Any = step) -> list[str]:
    net = nn.Linear(6, 1)
    trainer(callbacks=[profiler], max_epochs=1, run_dir="run").fit(
        net, step, loader(), optimizer=SGD(net.parameters(), lr=0.01)
    )
    return sorted(path.name for path in Path("run/profile").iterdir())


def test_one_cycle_is_one_file_of_its_active_steps_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert fitted(sheer.Profiler(wait=1, warmup=1, active=2)) == ["train.4.pt.trace.json"]
    events = json.loads(Path("run/profile/train.4.pt.trace.json").read_text())["traceEvents"]
    assert sum("Optimizer.step" in event["name"] for event in events) == 2
    assert "Self CPU" in capsys.readouterr().out


def test_cycles_repeat_and_a_table_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    files = fitted(sheer.Profiler(wait=1, warmup=1, active=1, repeat=0, rows=0))
    assert files == ["train.3.pt.trace.json", "train.6.pt.trace.json"]
    assert "Self CPU" not in capsys.readouterr().out


def test_what_was_recorded_before_an_error_is_written() -> None:
    def bad(net: nn.Module, batch: Any, step: int) -> Any:
        return {"loss": net(batch[0]).mean() / (1 if step < 3 else None)}  # type: ignore[operator]

    with pytest.raises(TypeError):
        fitted(sheer.Profiler(wait=0, warmup=1, active=5), bad)
    assert [path.name for path in Path("run/profile").iterdir()] == ["train.2.pt.trace.json"]


def test_a_schedule_that_records_nothing_is_refused() -> None:
    with pytest.raises(sheer.SettingsError, match="active is at least 1"):
        sheer.Profiler(active=0)
