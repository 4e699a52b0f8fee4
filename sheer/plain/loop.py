"""One's own loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sheer.build import takes_step_number
from sheer.data.batch import count_samples
from sheer.evaluation import Evaluation
from sheer.loop import finish, log_training, validate
from sheer.own_loop import apply_one, backward_alone, is_last_step, own_steps, start_loop
from sheer.plugins import Plugins
from sheer.run import Result, Run, result_of
from sheer.session import leave_if_told
from sheer.settings import Settings
from sheer.signals import StopSignals, is_signal


def plain_start_loop(
    cfg: Settings,
    plugins: Plugins,
    model: nn.Module,
    optimizers: Mapping[str, Any],
    schedulers: Mapping[str, Any],
    total_steps: int | None,
) -> PlainLoop:
    """Start a run without a loop."""
    run, state = start_loop(cfg, plugins, model, optimizers, schedulers, total_steps)
    return PlainLoop(cfg, run, state)


class PlainLoop:
    """A run whose loop is the script's own: it counts, logs, saves, stops and resumes."""

    def __init__(self, cfg: Settings, run: Run, state: dict[str, Any] | None) -> None:
        self.cfg = cfg
        self.run = run
        self.state = state
        self.signals = StopSignals()
        self.finished = False
        for logger in run.loggers.members:
            logger.start(run.info)

    def __enter__(self) -> PlainLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()

    @property
    def step(self) -> int:
        """The number of the step that is running; the first is 1."""
        return self.run.progress.step

    @property
    def epoch(self) -> int:
        """How many whole epochs are done."""
        return self.run.progress.epoch

    @property
    def epoch_ends(self) -> bool:
        """Whether the step that is running is the last of its epoch."""
        return self.run.data is not None and self.run.data.at_end

    @property
    def is_last(self) -> bool:
        """Whether the step that is running is the last, because a duration is over with it."""
        return is_last_step(self.cfg, self.run, self.epoch_ends)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.run.model

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """The optimizers by their names."""
        return self.run.optimizers

    @property
    def device(self) -> torch.device:
        """Where the model and the batches are."""
        return self.run.compute.device

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.run.info.run_dir

    def steps(self, loader: Any = None, *, resume_by_skipping: bool = False) -> Iterator[Any]:
        """Yield a batch on the device for each step, and after it do what is due; without a loader, the step's number."""
        yield from own_steps(self.cfg, self.run, self.signals, self.state, loader, resume_by_skipping)
        if self.signals.received is not None:
            self.finish()

    def update(self, optimizer: Optimizer, step_function: Any, batch: Any) -> Any:
        """Train on a batch: forward, backward, clip, update, clear; returns what the step returned."""
        optimizer.zero_grad()
        output = self.backward(step_function, batch, optimizer)
        self.apply(optimizer)
        return output

    def backward(self, step_function: Any, batch: Any, optimizer: Optimizer | None = None) -> Any:
        """Add the gradients of a step's loss to what the parameters hold; returns what the step returned."""
        parts = batch if self.cfg.accumulate_grad_batches > 1 else [(batch, count_samples(batch))]
        name = next((name for name, own in self.run.optimizers.items() if own is optimizer), None)
        prefix = f"{name}/" if name is not None and len(self.run.optimizers) > 1 else ""
        numbered = takes_step_number(step_function)
        return backward_alone(self.cfg, self.run, step_function, numbered, parts, prefix)

    def apply(self, optimizer: Optimizer) -> None:
        """Clip the gradients of an optimizer's parameters, update them, clear the gradients, and move its scheduler."""
        apply_one(self.cfg, self.run, optimizer)

    def log(self, metrics: Mapping[str, Any], samples: int = 1) -> None:
        """Add values to the metrics of training, to be logged as `train/<name>` at the next log point."""
        self.run.metrics.add(metrics, samples)

    def evaluate(self, step_function: Any, loader: Any) -> dict[str, float]:
        """Validate: run the step over all batches, log `val/<name>`, and let the best checkpoint be kept."""
        if self.cfg.limit_val_batches == 0:
            return {}
        numbered = takes_step_number(step_function, "eval_step")
        evaluation = Evaluation(step_function, loader, "val/", self.cfg.limit_val_batches, numbered)
        self.run.progress.epoch += self.epoch_ends  # this step is counted behind it
        stop = validate(self.cfg, self.run, evaluation)
        self.run.progress.epoch -= self.epoch_ends
        self.run.progress.stopped_by = stop or self.run.progress.stopped_by
        return dict(self.run.progress.metrics)

    def finish(self) -> Result:
        """End the run: log what is left, save, close the loggers."""
        progress = self.run.progress
        if progress.step > self.run.info.start_step and not self.finished:
            self.finished = True
            progress.stopped_by = progress.stopped_by or "break"
            if self.run.metrics and not is_signal(progress.stopped_by):
                log_training(self.cfg, self.run)
            finish(self.cfg, self.run, None, saved=progress.saved_at == progress.step)
        for logger in self.run.loggers.members:
            logger.close()
        leave_if_told(self.run, self.signals)
        return result_of(self.run)
