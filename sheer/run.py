"""The live state of a run: what is trained, by what, how far it has come, and who is told."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sheer.checkpoint.optimizer import NamedOptimizer
from sheer.console import Console
from sheer.data.feed import TrainingData
from sheer.errors import RunError, SheerWarning
from sheer.evaluation import Compute
from sheer.events import Events, RunInfo
from sheer.loggers.base import Loggers
from sheer.metrics import Metrics
from sheer.nonfinite import Watch
from sheer.progress import Progress
from sheer.random import random_state, set_random_state


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int  # steps that were made, earlier sessions counted in
    epoch: int  # whole epochs
    metrics: dict[str, float]  # of the last validation; of the last log point where nothing was validated
    best: Path | None  # the best checkpoint by the monitored metric
    last: Path | None  # the newest checkpoint
    stopped_by: str  # "max_steps", "max_epochs", "max_time", a signal, or what a callback said
    run_dir: Path


@dataclass(kw_only=True)
class Run:
    """What `fit` and one's own loop work on."""

    model: nn.Module
    optimizers: dict[str, Optimizer]
    schedulers: dict[str, Any]
    plateaus: dict[str, ReduceLROnPlateau]  # the schedulers that follow the monitored metric
    scaler: torch.amp.GradScaler | None  # only for "16-mixed"
    compute: Compute
    numbered: tuple[Callable[..., Any], ...]  # the step functions that take the step's number; objects need no hash
    parameters: dict[Optimizer, list[nn.Parameter]]  # what each optimizer updates, in the model's order
    events: Events
    callbacks: dict[str, Any]  # those that have state
    averaging: Any | None  # the callback whose averages evaluation uses
    loggers: Loggers
    console: Console
    info: RunInfo
    record: dict[str, Any]  # what `run.json` is to hold
    total_steps: int | None
    data: TrainingData | None = None
    scale: float = 1.0  # the scaler's factor after the last step; 1 without one
    progress: Progress = field(default_factory=Progress)
    metrics: Metrics = field(default_factory=Metrics)
    watch: Watch = field(default_factory=Watch)
    last_metrics: dict[str, float] = field(
        default_factory=dict
    )  # of the last validation, or log point where there is none
    validated_at: int = -1  # the step that `last_metrics` were validated at
    saved: Path | None = None  # the checkpoint that was written last
    batch: Any = None  # what the step that is running trains on
    restored: dict[str, Any] | None = None  # what a checkpoint held of the random states and the data, until it is used
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.scaler is not None:
            self.scale = self.scaler.get_scale()

    @property
    def seconds(self) -> float:
        """How long the run has taken, earlier sessions counted in."""
        return self.progress.seconds + time.monotonic() - self.began

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.info.run_dir / "checkpoints"

    def state_dict(self) -> dict[str, Any]:
        """Return all that a checkpoint holds besides the model's weights."""
        return {
            "progress": {**self.progress.state_dict(), "seconds": self.seconds},
            "optimizers": {name: NamedOptimizer(o, self.model).state_dict() for name, o in self.optimizers.items()},
            "schedulers": {
                name: scheduler.state_dict() for name, scheduler in (self.schedulers | self.plateaus).items()
            },
            "scheduler_classes": self._scheduler_classes(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "metrics": self.metrics.state_dict(),
            "last_metrics": self.last_metrics,
            "validated_at": self.validated_at,
            "random": random_state(),
            "data": self.data.state_dict() if self.data is not None else None,
            "callbacks": {name: callback.state_dict() for name, callback in self.callbacks.items()},
            "loggers": self.loggers.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, same_run: bool = True) -> None:
        """Take back what `state_dict` returned; the data and the random states when the loop opens them.

        Args:
            state: what was saved.
            same_run: whether it is this very run that goes on, so that its loggers go on where they were.
        """
        if state["scheduler_classes"] != self._scheduler_classes():
            before, now = state["scheduler_classes"] or "none", self._scheduler_classes() or "none"
            raise RunError(
                f"The schedulers that were saved are {before}, and these are {now}. Build the same, or start a new run and take the weights "
                "with sheer.load_weights."
            )
        gone = [name for name in state["callbacks"] if name not in self.callbacks]
        if gone:
            warnings.warn(
                f"The checkpoint holds the state of {', '.join(gone)}, and there is no such callback now: it is dropped.",
                SheerWarning,
                stacklevel=2,
            )
        self.progress.load_state_dict(state["progress"])
        for name, scheduler in (self.schedulers | self.plateaus).items():
            scheduler.load_state_dict(state["schedulers"][name])
        for name, optimizer in self.optimizers.items():  # after the schedulers, which may touch the groups
            NamedOptimizer(optimizer, self.model).load_state_dict(state["optimizers"][name])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
            self.scale = self.scaler.get_scale()
        self.metrics.load_state_dict(state["metrics"])
        self.last_metrics, self.validated_at = state["last_metrics"], state["validated_at"]
        for name, callback in self.callbacks.items():
            if name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][name])
        if same_run:
            self.loggers.load_state_dict(state["loggers"])
        self.restored = {"random": state["random"], "data": state["data"]}

    def _scheduler_classes(self) -> dict[str, str]:
        return {name: type(scheduler).__name__ for name, scheduler in (self.schedulers | self.plateaus).items()}

    def open_data(self, data: TrainingData) -> Callable[[], None] | None:
        """Make `data` the run's; return what puts the random states back, if a checkpoint was restored."""
        self.data = data
        restored, self.restored = self.restored, None
        if restored is None:
            return None
        if restored["data"] is not None:
            data.load_state_dict(restored["data"])
        return functools.partial(set_random_state, restored["random"])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's state by name; what else `get_extra_state` may add is left out."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def result(run: Run) -> Result:
    """Return how a run ended."""
    return Result(
        step=run.progress.step,
        epoch=run.progress.epoch,
        metrics=run.last_metrics,
        best=linked(run.checkpoints / "best"),
        last=linked(run.checkpoints / "last"),
        stopped_by=run.progress.stopped_by or "",
        run_dir=run.info.run_dir,
    )


def linked(link: Path) -> Path | None:
    """Return the checkpoint that a link points to, or None where there is no such link."""
    return link.parent / link.readlink() if link.is_symlink() else None
