"""Going back with everything that has a state: the run is, bit for bit, one that left the bad batches out from its start."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

import sheer
from sheer.progress import Progress
from tests.faults.runs import same
from tests.rollback import Step, progress_of, run
from tests.task import loader, model, step

pytestmark = pytest.mark.usefixtures("in_memory")

BAD = [(0, 2), (1, 3), (2, 6)]


@dataclass(frozen=True)
class Feature:
    """Something that has a state."""

    settings: dict[str, Any] = field(default_factory=dict)
    scheduler: Callable[[Any], Any] | None = None
    callbacks: Callable[[], list[Any]] = list
    make: Callable[[], nn.Module] = model
    evaluated: Callable[..., Any] = step


class Squares(nn.Module):
    """A metric object, as torchmetrics has them."""

    def __init__(self, is_saved: bool) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()), persistent=is_saved)

    def update(self, values: Tensor) -> None:
        self.total += values.square().sum()

    def compute(self) -> Tensor:
        return self.total

    def reset(self) -> None:
        self.total = torch.zeros(())


class Measured(nn.Module):
    def __init__(self, is_saved: bool = True) -> None:
        super().__init__()
        self.net, self.squares = model(), Squares(is_saved)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        self.squares.update(out.detach())
        return out


class Measuring(Step):
    def __call__(self, net: Any, batch: Any, step: int) -> dict[str, Any]:
        out: dict[str, Any] = super().__call__(net, batch, step)
        return {**out, "squares": net.squares} if isinstance(net, Measured) else out


def noisy(net: nn.Module, batch: Any) -> dict[str, Tensor]:
    x, y = batch
    return step(net, (x + 0.1 * torch.randn_like(x), y))


class Moved:
    """A callback with a state, which it takes up when it is told that the run begins."""

    def __init__(self) -> None:
        self.sum, self.loaded = torch.zeros(()), None

    def on_fit_start(self, model: nn.Module, optimizers: Any, info: Any) -> None:
        self.sum = torch.zeros(()) if self.loaded is None else self.loaded["sum"].clone()

    def on_update(self, step: int, model: nn.Module) -> None:
        self.sum += sum(p.detach().sum() for p in model.parameters())

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


MONITOR = {"monitor": "val/loss", "validate_every_n_steps": 5}
FEATURES = {
    "a validation that draws, also before the first step": Feature({"validate_first": True}, evaluated=noisy),
    "a scheduler of epochs": Feature({"scheduler_interval": "epoch"}, lambda o: StepLR(o, 1, gamma=0.5)),
    "a scheduler of validations": Feature(
        {"scheduler_interval": "validation", **MONITOR}, lambda o: ExponentialLR(o, 0.5)
    ),
    "a plateau scheduler": Feature(MONITOR, lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0)),
    "a scaler": Feature({"precision": "16-mixed"}),
    "EMA that begins late": Feature(callbacks=lambda: [sheer.EMA(0.9, start_step=6)]),
    "SWA": Feature(
        callbacks=lambda: [sheer.SWA(start_step=4, every_n_steps=3, lr=0.02, bn_loader=loader(25, shuffle=False))]
    ),
    "early stopping": Feature(MONITOR, callbacks=lambda: [sheer.EarlyStopping(patience=2, min_delta=1e9)]),
    "layers that thaw": Feature(
        callbacks=lambda: [
            sheer.Freeze("0", until_step=5),
            sheer.Freeze("4", until_epoch=2),
            sheer.LearningRateMonitor(),
        ]
    ),
    "micro-batches": Feature({"micro_batch_size": 6, "gradient_clip_val": 0.5}),
    "metric objects and a callback of one's own": Feature(
        {"log_every_n_steps": 5}, callbacks=lambda: [Moved()], make=Measured
    ),
    "metric objects that are not saved, and begin anew at log points": Feature(
        {"checkpoint": sheer.Checkpoint(every_n_steps=4)}, make=lambda: Measured(is_saved=False)
    ),
    "an epoch that is cut short": Feature({"limit_train_batches": 4, "max_epochs": 4}),
    "deterministic algorithms and values that are clipped": Feature(
        {"deterministic": True, "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
    ),
}


@pytest.mark.parametrize("name", FEATURES)
def test_with(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feature = FEATURES[name]
    monkeypatch.setattr("tests.rollback.model", feature.make)
    how: dict[str, Any] = {
        "scheduler": feature.scheduler, "callbacks": feature.callbacks, "val": loader(32, shuffle=False), "log_every_n_steps": 4,
        "fit": {"eval_step": feature.evaluated}, "checkpoint": sheer.Checkpoint(every_n_steps=3), **feature.settings,
    }  # fmt: skip
    warnings.simplefilter("ignore")
    left = run("bad", Measuring(BAD), **how)
    times, left_out = progress_of("bad")["rollbacks"], progress_of("bad")["left_out"]
    assert times == len(left_out) >= 1

    monkeypatch.setattr("sheer.start.Progress", functools.partial(Progress, left_out=left_out))
    same(left, run("clean", Measuring([]), rollback="raise", **how))
