"""One's own loop over the parts that `fit` is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sheer.build import takes_step_number
from sheer.data.batch import StepBatch, count_samples
from sheer.errors import SettingsError
from sheer.loop import finish, steps, validate
from sheer.plugins import Plugins
from sheer.run import Result, Run, result
from sheer.session import Session, leave_if_told
from sheer.settings import Settings, unknown_name
from sheer.start import evaluation_of, start
from sheer.step import Step, apply, backward, scale_gradients


def start_loop(
    cfg: Settings,
    plugins: Plugins,
    model: nn.Module,
    optimizers: Mapping[str, Any],
    schedulers: Mapping[str, Any],
) -> Loop:
    """Start a run without a loop."""
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise SettingsError(
            'optimizers must name each optimizer, as {"adam": optimizer}: the names are those their states are saved under.'
        )
    if not isinstance(schedulers, Mapping):
        raise SettingsError(
            f'schedulers must name each by its optimizer, as {{"{next(iter(optimizers))}": scheduler}}, not be a {type(schedulers).__name__}.'
        )
    for name in schedulers:
        if name not in optimizers:
            raise unknown_name(name, optimizers, "optimizers, which schedulers refers to,")
    return Loop(cfg, start(cfg, plugins, model, optimizers, schedulers, None))


class Loop:
    """A run whose loop is yours: `Trainer.start` makes one. It counts, logs, saves, stops and resumes as `fit` does.

    Example:
        run = trainer.start(gan, optimizers={"d": opt_d, "g": opt_g})
        for batch in run.steps(train_loader):
            run.update(opt_d, d_step, batch)
            run.update(opt_g, g_step, batch)
        run.finish()
    """

    def __init__(self, cfg: Settings, run: Run) -> None:
        self._cfg, self._run = cfg, run
        self._session = Session(run)
        self._session.__enter__()
        self._finished = False

    def __enter__(self) -> Loop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self._session.__exit__(kind, error, trace)

    @property
    def step(self) -> int:
        """The number of the step that is running; the first is 1."""
        return self._run.progress.step

    @property
    def epoch(self) -> int:
        """How many whole epochs are done."""
        return self._run.progress.epoch

    @property
    def epoch_ends(self) -> bool:
        """Whether the step that is running is the last of its epoch."""
        return self._run.data is not None and self._run.data.at_end

    @property
    def model(self) -> nn.Module:
        """The model, which is the very object that was passed."""
        return self._run.model

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """The optimizers by their names."""
        return self._run.optimizers

    @property
    def device(self) -> torch.device:
        """Where the model and the batches are."""
        return self._run.compute.device

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self._run.info.run_dir

    def steps(self, loader: Any = None, *, resume_by_skipping: bool = False) -> Iterator[Any]:
        """Yield a batch on the device for each step, and after it log, save and stop as the settings say.

        With `accumulate_grad_batches` above 1 what is yielded holds several batches; hand it to `update` as it is. Without a
        loader the step's number is yielded, until a duration is over.
        """
        return steps(self._cfg, self._run, self._session, loader, resume_by_skipping)

    def update(self, optimizer: Optimizer, step: Step, batch: Any) -> Any:
        """Train on a batch: forward, backward, clip, update, clear; returns what the step returned.

        What other optimizers' losses left in these parameters' gradients is dropped first. With several optimizers the metrics
        are logged as `train/<optimizer>/<name>`.
        """
        self._known(optimizer).zero_grad()
        output = self.backward(step, batch, optimizer)
        self.apply(optimizer)
        return output

    def backward(self, step: Step, batch: Any, optimizer: Optimizer | None = None) -> Any:
        """Add the gradients of a step's loss to what the parameters hold; returns what the step returned."""
        run = self._run
        parts = self._with_samples(batch)
        if takes_step_number(step, model=run.model) and step not in run.numbered:
            run.numbered = (*run.numbered, step)
        name = next((name for name, own in run.optimizers.items() if own is optimizer), None)
        prefix = f"{name}/" if name is not None and len(run.optimizers) > 1 else ""
        held = (
            [(p, p.grad) for p in run.model.parameters() if p.grad is not None]
            if len(parts) > 1 or self._cfg.micro_batch_size
            else []
        )
        for parameter, _ in held:
            parameter.grad = None  # only the gradients of this loss are divided by its counts
        output = backward(self._cfg, run, step, parts, prefix)
        for parameter, gradient in held:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        return output

    def apply(self, optimizer: Optimizer) -> None:
        """Clip the gradients of an optimizer's parameters, update them, clear the gradients, and move its scheduler."""
        name = next(name for name, own in self._run.optimizers.items() if own is self._known(optimizer))
        before = self._run.scale
        apply(self._cfg, self._run, optimizer, self._run.schedulers.get(name))
        if self._run.scale != before:  # gradients that wait for another optimizer carry the factor from before
            scale_gradients(self._run, self._run.scale / before)

    def log(self, metrics: Mapping[str, Any], samples: int = 1) -> None:
        """Add values to the metrics of training, to be logged as `train/<name>` at the next log point."""
        self._run.metrics.add(metrics, samples)

    def evaluate(self, step: Step, loader: Any) -> dict[str, float]:
        """Validate: run the step over all batches, log `val/<name>`, tell the callbacks, and let the best checkpoint be kept."""
        run = self._run
        evaluation = evaluation_of(self._cfg, run.model, step, loader)
        if evaluation is None:
            return {}
        run.progress.stopped_by = validate(self._cfg, run, evaluation) or run.progress.stopped_by
        return dict(run.last_metrics)

    def finish(self) -> Result:
        """End the run: log what is left, save, close the loggers."""
        if not self._finished:
            self._finished = True
            if self._run.progress.step > self._run.info.start_step:
                finish(self._cfg, self._run, None)
            self._session.__exit__(None, None, None)
            leave_if_told(self._run, self._session.signals.received)
        return result(self._run)

    def _with_samples(self, batch: Any) -> StepBatch:
        """Return a batch with its number of samples, which is known from the order where it is the one that `steps` yielded."""
        if isinstance(batch, StepBatch):
            return batch
        yielded: StepBatch | None = self._run.batch
        if yielded is not None and len(yielded) == 1 and batch is yielded[0][0]:
            return yielded
        return StepBatch([(batch, count_samples(batch))])

    def _known(self, optimizer: Optimizer) -> Optimizer:
        if not any(own is optimizer for own in self._run.optimizers.values()):
            raise SettingsError(
                f"This optimizer is not one of those the run was started with: {', '.join(self._run.optimizers)}."
            )
        return optimizer
