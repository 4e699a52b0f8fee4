"""The learning rate range test: a short run in which the rate grows, and how the loss takes it."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sheer.build import build_optimizer, make_compute, place_model, resolve_device
from sheer.console import Console
from sheer.errors import SettingsError
from sheer.events import RunInfo
from sheer.loop import fit
from sheer.loss import Step
from sheer.plugins import Plugins
from sheer.random import random_state, set_random_state
from sheer.schedules import set_rate
from sheer.settings import Settings, expanded

DIVERGED = 4.0  # times the lowest loss, in its smoothed course: what comes after it tells nothing


@dataclass(frozen=True)
class LRFinding:
    """What `find_lr` measured."""

    lrs: list[float]  # the learning rate of each step
    losses: list[float]  # the loss of each step, as it was
    suggestion: float | None  # the rate where the smoothed loss fell fastest; None: it never fell

    def plot(self, path: str | Path) -> Path:
        """Draw loss over learning rate into a picture file, and return its path."""
        from matplotlib.figure import Figure as Plot

        plot = Plot(figsize=(6, 4), layout="constrained")
        axes = plot.subplots()
        axes.plot(self.lrs, self.losses, color="0.8", label="loss")
        axes.plot(self.lrs, smoothed(self.losses), label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="tab:red", linestyle=":", label=f"suggestion {self.suggestion:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
        axes.legend()
        plot.savefig(path)
        return Path(path)


def find_lr(
    model: nn.Module,
    step: Step,
    loader: Any,
    optimizer: Any,
    *,
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    steps: int = 100,
    settings: Settings | None = None,
) -> LRFinding:
    """Train a few steps with a growing learning rate, and say where the loss falls fastest (Smith 2015, arXiv:1506.01186).

    It is a run of `fit` with a callback that sets the rate, so precision, clipping and accumulation are those of training. It
    stops early where the loss is NaN or has grown to four times its lowest. Afterwards the model, the optimizer and the random
    states are as they were; the model is on the device, not compiled. A loader that has a state of its own has moved on.

    Args:
        model: the module, trained in place and then restored.
        step: as for `Trainer.fit`.
        loader: as for `Trainer.fit`.
        optimizer: an optimizer, or a function of the model that returns one. Its groups keep their ratios; the rate is the first's.
        min_lr: the rate of the first step.
        max_lr: the rate of the last step; those between are spaced evenly in the logarithm.
        steps: number of steps.
        settings: how to train: `trainer.settings`, of which durations, logging, validation and checkpoints are left out.

    Raises:
        SettingsError: the range is empty, or there are too few steps.
    """
    if not 0 < min_lr < max_lr or steps < 5:
        raise SettingsError(
            f"find_lr(min_lr={min_lr!r}, max_lr={max_lr!r}, steps={steps!r}): min_lr must be above 0 and below max_lr, with 5 steps at least."
        )
    swept = sweep_settings(settings or Settings(), steps)
    place_model(model, make_compute(swept.precision, resolve_device(swept.device)))
    optimizer = build_optimizer(model, optimizer)
    sweep = _Sweep(min_lr, max_lr, steps)
    states, modes = random_state(), [(module, module.training) for module in model.modules()]
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    silent: Any = Console(live=False, file=io.StringIO())
    try:
        fit(swept, Plugins([sweep], [silent]), model, step, loader, None, step, optimizer, None, None, False)
    finally:
        if sweep.run_dir is not None:
            shutil.rmtree(sweep.run_dir, ignore_errors=True)  # it is gone where the first step failed
        optimizer.zero_grad()
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        for module, training in modes:
            module.training = training
        set_random_state(states)
    return LRFinding(sweep.lrs, sweep.losses, steepest(sweep.lrs, sweep.losses))


def sweep_settings(settings: Settings, steps: int) -> Settings:
    """Return settings for a run of so many steps that leaves nothing behind."""
    return expanded(
        dataclasses.replace(
            settings,
            fast_dev_run=steps,
            compile=False,  # it would stay in the model
            resume=None,
            run_dir=None,
            monitor=None,
            monitor_mode="min",
            log_every_n_steps=1,
            validate_every_n_steps=None,
            validate_first=False,
            nonfinite="ignore",
        )
    )


class _Sweep:
    """Sets the learning rate of each step, keeps the losses, and stops where they diverge."""

    def __init__(self, min_lr: float, max_lr: float, steps: int) -> None:
        self.min_lr, self.ratio = min_lr, (max_lr / min_lr) ** (1 / (steps - 1))
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.run_dir: Path | None = None
        self._groups: list[dict[str, Any]] = []
        self._shares: list[float] = []

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        self.run_dir = info.run_dir
        self._groups = optimizers["optimizer"].param_groups
        first = float(self._groups[0]["lr"])
        self._shares = [float(group["lr"]) / first if first else 1.0 for group in self._groups]

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        self.lrs.append(self.min_lr * self.ratio ** (step - 1))
        for group, relative in zip(self._groups, self._shares, strict=True):
            set_rate(group, self.lrs[-1] * relative)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.losses.append(metrics["train/loss"])

    def on_step_end(self, step: int, model: nn.Module) -> str | None:
        course = smoothed(self.losses)
        if not math.isfinite(course[-1]) or course[-1] > DIVERGED * min(course) > 0:
            return "the loss diverged"
        return None


def smoothed(losses: Sequence[float], keep: float = 0.9) -> list[float]:
    """Return the exponential moving average of losses, divided by 1 - keep^n, which corrects for its start at 0."""
    out, average = [], 0.0
    for count, loss in enumerate(losses, start=1):
        average = keep * average + (1 - keep) * loss
        out.append(average / (1 - keep**count))
    return out


def steepest(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """Return the learning rate, before the lowest smoothed loss, where it fell fastest over the logarithm of the rate.

    The slope is taken over a fifth of the course, so that the noise of single batches does not decide; the first fifth, where the
    rates are too small to move the loss and the average is of few, does not count. None where the loss fell nowhere.
    """
    course = [loss for loss in smoothed(losses) if math.isfinite(loss)]
    width = max(1, len(course) // 10)
    lowest = course.index(min(course)) if course else 0
    slopes = {
        index: course[index + width] - course[index - width]  # the rates are evenly spaced
        for index in range(2 * width, min(lowest + 1, len(course) - width))
    }
    fastest = min(slopes, key=lambda index: slopes[index], default=None)
    return lrs[fastest] if fastest is not None and slopes[fastest] < -1e-6 * abs(course[fastest]) else None
