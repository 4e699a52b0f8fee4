"""The live state of a run: what is trained, by what, how far it has come, and who is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sheer.checkpoint.saver import Saver
from sheer.compilation import Compilations
from sheer.console import Console
from sheer.data.feed import TrainingData
from sheer.distributed.mesh import Ranks
from sheer.distributed.stop import StopAgreement
from sheer.evaluation import Compute
from sheer.events import Events, RunInfo
from sheer.leaving import BeforeValidation, Told
from sheer.loggers.base import Loggers
from sheer.metrics import Metrics
from sheer.nonfinite import Watch
from sheer.progress import Progress
from sheer.random import Before
from sheer.trail import Trail


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


@dataclass(kw_only=True, slots=True)
class Run:
    """What `fit` and one's own loop work on."""

    model: nn.Module
    optimizers: Mapping[str, Optimizer]
    schedulers: dict[str, Any]
    plateaus: dict[str, ReduceLROnPlateau]  # the schedulers that follow the monitored metric
    scaler: torch.amp.GradScaler | None  # only for "16-mixed"
    compute: Compute
    ranks: Ranks | None  # those that train together; None: this process does alone
    agreement: StopAgreement | None  # by which several ranks stop at the same step
    stepper: nn.Module | None  # what runs a step on several ranks: the model wrapped by DDP or `fully_shard`
    parameters: dict[Optimizer, list[nn.Parameter]]  # what each optimizer updates, in the model's order
    unused: set[Optimizer]  # those that have not updated anything yet
    events: Events
    callbacks: dict[str, Any]  # those that have state
    averaging: Any | None  # the callback whose averages evaluation uses
    loggers: Loggers
    console: Console
    saver: Saver
    rewind: Before | None  # what a step is done again from, where the device's memory runs out
    info: RunInfo
    record: dict[str, Any]  # what `run.json` is to hold
    total_steps: int | None
    scheduled_steps: int | None  # the steps that a function was asked to make a scheduler for
    data: TrainingData | None = None
    progress: Progress = field(default_factory=Progress)
    metrics: Metrics = field(default_factory=Metrics)
    watch: Watch = field(default_factory=Watch)
    trail: Trail | None = None  # of the last steps, in a run that may go back to a checkpoint
    compilations: Compilations = field(default_factory=Compilations)
    told: Told | None = None  # by what a validation may be left in its middle
    leave: Callable[[], None] | None = None  # saves the run as it was before a validation that was left
    ends_owed: bool = False  # whether the step that ends is one that an earlier session has logged
    before_validating: BeforeValidation | None = None  # what held before the validation that runs
    changes: list[str] = field(
        default_factory=list
    )  # what is not as it was in the checkpoint that the run goes on from
    graphs: Any | None = None  # the captured steps, with `cuda_graph`
    graphless: str | None = None  # why there are none, or none any more, though they were asked for
    in_steps: bool = False  # whether one's own loop is between its first step and its last
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """How long the run has taken, earlier sessions counted in."""
        return self.progress.seconds + time.monotonic() - self.began

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.info.run_dir / "checkpoints"


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's state by name; what else `get_extra_state` may add is left out."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def result_of(run: Run) -> Result:
    """Return how a run ended."""
    best, last = run.saver.pointed_path("best"), run.saver.pointed_path("last")
    return Result(
        step=run.progress.step,
        epoch=run.progress.epoch,
        metrics=run.progress.metrics,
        best=best,
        last=last,
        stopped_by=run.progress.stopped_by or "",
        run_dir=run.info.run_dir,
    )
