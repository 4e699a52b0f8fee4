"""Timer: where the time went, with a clock of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD

import sheer
from sheer.callbacks import timer
from tests.task import loader, step, trainer


class Clock:
    """Time that passes only when it is told to: a step takes 1 second, a validation 100, a save 1,000."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timer, "time", self)

    def perf_counter(self) -> float:
        return self.now

    def on_update(self, step: int, model: nn.Module) -> None:
        self.now += 1

    def on_evaluation_end(self, model: nn.Module) -> None:  # in reverse order: before the timer's
        self.now += 100

    def on_save(self, step: int, path: Path) -> None:
        self.now += 1000


def fitted(*callbacks: Any, **settings: Any) -> sheer.Result:
    net = nn.Linear(6, 1)
    settings = {"max_epochs": 2, "run_dir": "run", "resume": "auto", "log_every_n_steps": 3, **settings}
    return trainer(
        callbacks=callbacks, checkpoint=sheer.Checkpoint(every_n_epochs=1, asynchronous=False), **settings
    ).fit(net, step, loader(), loader(50), optimizer=SGD(net.parameters(), lr=0.01))


def test_seconds_of_training_validation_and_saving_also_over_a_resumption(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    save_first = sheer.On(save=clock.on_save)
    rest = sheer.On(update=clock.on_update, evaluation_end=clock.on_evaluation_end)
    fitted(save_first, sheer.Timer(), rest, max_epochs=2)
    fitted(save_first, sheer.Timer(), rest, max_epochs=3)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    at = {line["step"]: line for line in lines if "time/total" in line}
    assert (at[6]["time/train"], at[6]["time/validation"], at[6]["time/saving"]) == (6, 100, 0)  # a try before step 1
    assert (at[12]["time/train"], at[12]["time/validation"], at[12]["time/saving"]) == (12, 200, 1000)
    assert at[18]["time/train"] == 18 and at[18]["time/validation"] == 400
    assert at[18]["time/total"] == at[18]["time/train"] + at[18]["time/validation"] + at[18]["time/saving"]


def test_stops_after_a_time_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    save_first = sheer.On(save=clock.on_save)
    rest = sheer.On(update=clock.on_update, evaluation_end=clock.on_evaluation_end)
    outcome = fitted(save_first, sheer.Timer(stop_after=9), rest)
    assert outcome.step == 9 and outcome.stopped_by == "Timer: 9 seconds of training"


def test_a_time_of_nothing_is_refused() -> None:
    with pytest.raises(sheer.SettingsError, match="above 0"):
        sheer.Timer(stop_after=0)
