"""Everything that has a state x where a run is stopped or killed: it goes on, in a new process, and ends as the one that was not.

Bit for bit: weights, optimizer, schedulers, callbacks, random states, and each line of the log.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

import sheer
from sheer.checkpoint.optimizer import optimizer_state
from tests.faults.runs import in_a_process, room, same
from tests.faults.warm import Warm
from tests.task import loader, model, step
from tests.test_resume import Augmented, Stream

pytestmark = pytest.mark.xdist_group("kills")

EPOCHS = 3


@dataclass(frozen=True)
class Feature:
    """Something that has a state."""

    settings: dict[str, Any] = field(default_factory=dict)
    scheduler: Callable[[Any], Any] | None = None
    callbacks: Callable[[], list[Any]] = list
    data: Callable[[], Any] = loader
    step: Callable[..., Any] = step
    evaluated: Callable[..., Any] = step


def scaled(net: nn.Module, batch: Any, step: int) -> Tensor:
    """Overflows now and then, so that the factor of the scaler moves."""
    x, y = batch
    return ((net(x) - y) ** 2).mean() * (1e34 if step in (3, 9, 13) else 1.0)


def sometimes_infinite(net: nn.Module, batch: Any, step: int) -> Tensor:
    x, y = batch
    return ((net(x) - y) ** 2).mean() * (float("inf") if step in (4, 8, 11) else 1.0)


class Measured(nn.Module):
    """A model with a metric object, which is read at log points only and saved with it."""

    def __init__(self) -> None:
        from torchmetrics import MeanSquaredError

        super().__init__()
        self.net, self.squares = model(), MeanSquaredError()
        self.squares.persistent(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def measured(net: Measured, batch: Any) -> dict[str, Any]:
    x, y = batch
    prediction = net(x)
    net.squares.update(prediction.detach(), y)
    error, few = (prediction - y).abs().flatten(), y.flatten() > 0
    return {"loss": ((prediction - y) ** 2).mean(), "mse": net.squares, "few": sheer.mean(error, mask=few)}


def noisy(net: nn.Module, batch: Any) -> dict[str, Tensor]:
    """A validation that draws random numbers, which training must not see."""
    x, y = batch
    return step(net, (x + 0.1 * torch.randn_like(x), y))


MONITOR = {"monitor": "val/loss"}
FEATURES: dict[str, Feature] = {
    "dropout and batch norm": Feature(),
    "a validation that draws": Feature({"validate_every_n_steps": 5}, evaluated=noisy),
    "a scheduler of steps": Feature(scheduler=lambda o: OneCycleLR(o, max_lr=0.05, total_steps=21)),
    "a scheduler of epochs": Feature({"scheduler_interval": "epoch"}, lambda o: StepLR(o, 1, gamma=0.5)),
    "a scheduler of validations": Feature(
        {"scheduler_interval": "validation", "validate_every_n_steps": 5}, lambda o: ExponentialLR(o, 0.5)
    ),
    "a plateau scheduler": Feature(
        {**MONITOR, "validate_every_n_steps": 5}, lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0)
    ),
    "a scaler": Feature({"precision": "16-mixed"}, step=scaled, evaluated=step),
    "steps left out": Feature({"nonfinite": "skip"}, step=sometimes_infinite, evaluated=step),
    "EMA": Feature(callbacks=lambda: [sheer.EMA(0.9, start_step=6)]),
    "SWA": Feature(
        callbacks=lambda: [sheer.SWA(start_step=4, every_n_steps=3, lr=0.02, bn_loader=loader(25, shuffle=False))]
    ),
    "early stopping": Feature(
        {**MONITOR, "validate_every_n_steps": 5}, callbacks=lambda: [sheer.EarlyStopping(patience=2, min_delta=1e9)]
    ),
    "accumulation": Feature(
        {"accumulate_grad_batches": 2, "micro_batch_size": 6, "gradient_clip_val": 0.5, "validate_every_n_steps": 5}
    ),
    "augmentation": Feature(data=lambda: DataLoader(Augmented(), 16, shuffle=True)),
    "augmentation in 3 workers": Feature(data=lambda: DataLoader(Augmented(), 16, shuffle=True, num_workers=3)),
    "iterable data with a state": Feature(data=Stream),
    "running metrics": Feature(
        {"validate_every_n_steps": 5, "log_every_n_steps": 6}, step=measured, evaluated=measured
    ),
}


Moment = Callable[[Feature], int]


def the_middle_of_an_epoch(feature: Feature) -> int:
    return 2 if "accumulate_grad_batches" in feature.settings else 9


def a_validation(feature: Feature) -> int:
    """In the middle of an epoch, or at its end, before what else comes there."""
    steps = {"accumulate_grad_batches": 5, "validate_every_n_steps": 10}
    return next((at for setting, at in steps.items() if setting in feature.settings), 14)


def the_end_of_an_epoch(feature: Feature) -> int:
    return 8 if "accumulate_grad_batches" in feature.settings else 14


MOMENTS = (the_middle_of_an_epoch, a_validation, the_end_of_an_epoch)  # a run comes to them in this order


class Ends:
    """Stops or kills this process at a moment, and counts the batches of validations."""

    def __init__(self, number: int | None, moment: Moment | None, feature: Feature) -> None:
        self.number, self.moment, self.step = number, moment, 0
        self.at = moment(feature) if moment is not None else -1
        self.evaluated: list[int] = []  # the step of each batch

    def act(self) -> None:
        if self.number is not None:
            os.kill(os.getpid(), self.number)

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        self.step = step

    def on_gradients(self, step: int, model: nn.Module) -> None:
        if self.moment is the_middle_of_an_epoch and step == self.at:
            self.act()

    def on_epoch_end(self, epoch: int, model: nn.Module) -> None:
        if self.moment is the_end_of_an_epoch and epoch == 1:
            self.act()

    def evaluate(self, evaluated: Callable[..., Any], net: nn.Module, batch: Any) -> Any:
        self.evaluated.append(self.step)
        if self.moment is a_validation and self.step == self.at and self.evaluated.count(self.step) == 2:
            self.act()
        return evaluated(net, batch)


def train(folder: str, name: str, moment: Moment | None, number: int | None) -> dict[str, Any]:
    """Train, or go on, all objects new; at a moment get a signal. Returns all that is left."""
    feature = FEATURES[name]
    sheer.seed_everything(0)
    net = Measured() if feature.step is measured else model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    scheduler = feature.scheduler(optimizer) if feature.scheduler is not None else None
    callbacks, ends = feature.callbacks(), Ends(number, moment, feature)
    settings = {"log_every_n_steps": 4, **feature.settings}
    made = sheer.Trainer(
        max_epochs=EPOCHS, device="cpu", run_dir=folder, resume="auto", callbacks=[*callbacks, ends],
        checkpoint=sheer.Checkpoint(every_n_steps=3), loggers=[sheer.Console(live=False)], **settings,
    )  # fmt: skip
    made.fit(
        net, feature.step, feature.data(), loader(32, shuffle=False), optimizer=optimizer, scheduler=scheduler,
        eval_step=functools.partial(ends.evaluate, feature.evaluated),
    )  # fmt: skip
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    return {
        "weights": dict(net.state_dict()),
        "optimizer": optimizer_state(optimizer, net),
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
        "callbacks": [callback.state_dict() for callback in callbacks if hasattr(callback, "state_dict")],
        "lines": lines,
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "evaluated": ends.evaluated[-4:],  # the batches of the last validation: it was run whole
    }


def compare(name: str) -> list[str]:
    """Stop a run with a feature at each moment in turn, and kill another there; return what was wrong, each with its moment."""
    wrong = []
    if FEATURES[name].step is measured:
        import torchmetrics  # noqa: F401  here, once: it takes seconds
    with tempfile.TemporaryDirectory(dir=room()) as folder:
        os.chdir(folder)
        code, whole = in_a_process(train, "whole", name, None, None)
        if code or isinstance(whole, str):
            return [f"not stopped at all: {code} {whole}"]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for moment in MOMENTS:
                at, what = moment(FEATURES[name]), f"{number.name} in {moment.__name__}"
                code, told = in_a_process(train, number.name, name, moment, number)
                if code != (85 if number == signal.SIGTERM else -signal.SIGKILL):
                    wrong.append(f"{what}: it ended with {code}: {told if isinstance(told, str) else 'by itself'}")
                if number == signal.SIGTERM:
                    saved = Path(number.name, "checkpoints", "last").readlink().name
                    if saved[:13] != f"step-{at:08d}":  # or step-...-2, behind a validation of the same step
                        wrong.append(f"{what}: {saved} was saved")
            code, left = in_a_process(train, number.name, name, None, None)
            try:
                assert code == 0, f"{code}: {left}"
                same(left, whole)
            except AssertionError as error:
                wrong.append(f"{number.name}: {error}")
        os.chdir("/")
    return wrong


@pytest.mark.parametrize("name", FEATURES)
def test_a_run_with(name: str, warm: Warm) -> None:
    assert warm.call(compare, name) == []
