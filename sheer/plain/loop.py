"""One's own loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sheer.build import takes_step_number
from sheer.checkpoint.codec import encode
from sheer.checkpoint.optimizer import optimizer_state
from sheer.data.batch import StepBatch, count_samples
from sheer.evaluation import Evaluation
from sheer.loop import finish, log_training, validate
from sheer.own_loop import apply_one, backward_alone, is_last_step, own_steps, start_loop
from sheer.plain.checkpoint import plain_committed, plain_prune, plain_write
from sheer.plugins import Plugins
from sheer.run import Result, Run, result_of, tensors_of
from sheer.saving import check_weights, own_state_of, state_of
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
        samples = count_samples(batch) if self.cfg.accumulate_grad_batches == 1 else 0
        parts = batch if self.cfg.accumulate_grad_batches > 1 else StepBatch([(batch, samples)])
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


def plain_save_and_tell(cfg: Settings, run: Run, *, wait: bool) -> None:
    """Save, and tell the callbacks."""
    path = plain_save(cfg, run)
    run.progress.saved_at = run.progress.step
    for callback in run.events.save:
        callback.on_save(run.progress.step, path)


def plain_save(cfg: Settings, run: Run) -> Path:
    """Write a checkpoint of the run as it is at the end of a step, and delete those that it makes superfluous."""
    if cfg.nonfinite == "raise":
        run.watch.check(run.ranks)
        check_weights(run.model, run.progress.step, run.ranks)
    own, held = dict[str, Tensor](), dict[str, Tensor]()
    optimizers = {name: optimizer_state(optimizer, run.model) for name, optimizer in run.optimizers.items()}
    state = encode({**own_state_of(run), **state_of(run)}, own)
    state |= {"optimizers": encode(optimizers, held), "extra": encode(plain_extra(run.model), own, "extra")}
    trained, averages = tensors_of(run.model), run.averaging.averages() if run.averaging is not None else None
    groups = {"model": trained if averages is None else {**trained, **averages}, "optimizer": held, "state": own}
    if averages is not None:
        groups["training"] = trained  # "model" holds the averages, which are what is used
    measured = run.progress.metrics if run.progress.validated_at == run.progress.step else {}
    path = plain_write(run.checkpoints, run.progress.step, groups, state, run.info.run_id, encode(measured, {}))
    if cfg.checkpoint is not None:
        plain_prune(
            run.checkpoints,
            run.progress.step,
            keep_last=cfg.checkpoint.keep_last,
            keep_best=cfg.checkpoint.keep_best,
            every=cfg.checkpoint.keep_every_n_steps,
            monitor=cfg.monitor,
            mode=cfg.monitor_mode,
        )
    return path


def plain_extra(model: nn.Module) -> dict[str, Any]:
    """Return what a model's state holds besides tensors, by name."""
    return {name: value for name, value in model.state_dict().items() if not isinstance(value, Tensor)}


def plain_is_among_best(cfg: Settings, run: Run) -> bool:
    """Whether the metrics of a validation, right behind it, belong to the best that are kept."""
    if cfg.checkpoint is None or cfg.monitor is None or cfg.checkpoint.keep_best == 0:
        return False
    value, step = run.progress.metrics[cfg.monitor], run.progress.step
    earlier = [m["metrics"].get(cfg.monitor) for m in plain_committed(run.checkpoints).values() if m["step"] < step]
    others = [other for other in earlier if isinstance(other, (int, float))]
    as_good = [other for other in others if (other <= value if cfg.monitor_mode == "min" else other >= value)]
    return value == value and len(as_good) < cfg.checkpoint.keep_best
