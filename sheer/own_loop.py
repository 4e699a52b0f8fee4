"""One's own loop over the parts that `fit` is made of."""

from __future__ import annotations

import atexit
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sheer.announce import announce_data
from sheer.build import make_compute, resolve_device, takes_step_number
from sheer.data.batch import StepBatch
from sheer.data.shares import alone_or_counted
from sheer.distributed.mesh import form_ranks
from sheer.distributed.wrap import Parallelize
from sheer.errors import RunError, SettingsError, SheerWarning, user_level
from sheer.evaluation import Evaluation
from sheer.loop import begin, begin_step, count_batches, end_step, finish, log_training, save_and_tell, validate
from sheer.loss import Step
from sheer.plugins import Plugins
from sheer.random import set_random_state
from sheer.resume import open_data
from sheer.run import Result, Run, result_of
from sheer.session import Session, leave_if_told
from sheer.settings import Rollback, Settings, unknown_name
from sheer.signals import StopSignals, is_signal
from sheer.start import count_steps, evaluation_of, start_run, training_data
from sheer.step import apply, backward_of, scale_gradients


def start_loop(
    cfg: Settings,
    plugins: Plugins,
    model: nn.Module,
    optimizers: Mapping[str, Any],
    schedulers: Mapping[str, Any],
    total_steps: int | None,
    parallelize: Parallelize = None,
) -> tuple[Run, dict[str, Any] | None]:
    """Start a run without a loop; returns also the state that it goes on from."""
    check_loop(cfg, optimizers, schedulers)
    compute = make_compute(cfg.precision, resolve_device(cfg.device))
    ranks = form_ranks(cfg.parallel, compute.device, plugins.mesh)
    return start_run(cfg, plugins, compute, ranks, model, parallelize, optimizers, schedulers, None, total_steps)


def check_loop(cfg: Settings, optimizers: Mapping[str, Any], schedulers: Mapping[str, Any]) -> None:
    """Raise `SettingsError` for what a loop of one's own cannot be started with."""
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
    if isinstance(cfg.nonfinite, Rollback):
        raise SettingsError(
            "nonfinite=Rollback(...) makes steps again, and those of a loop of your own are not Sheer's to make: what else your loop does would not go "
            'back. Train with fit, or set nonfinite="skip" or "raise".'
        )
    if cfg.cuda_graph:
        warnings.warn(
            "cuda_graph=True captures the steps of fit; those of a loop of your own are made without.",
            SheerWarning,
            stacklevel=user_level(),
        )
    if cfg.autotune:
        warnings.warn(
            "autotune=True tunes fit; a loop of your own is trained as it is.", SheerWarning, stacklevel=user_level()
        )
    if cfg.validate_every_n_steps is not None or cfg.validate_first:
        warnings.warn(
            "validate_every_n_steps and validate_first do nothing in a loop of your own: call run.evaluate(step, loader) where you want it.",
            SheerWarning,
            stacklevel=user_level(),
        )


def own_steps(
    cfg: Settings,
    run: Run,
    signals: StopSignals,
    state: dict[str, Any] | None,
    loader: Any,
    resume_by_skipping: bool,
) -> Iterator[Any]:
    """Yield the batches of one's own loop, on the device, and do after each what is due; without a loader, the step's number."""
    train = training_data(cfg, run.compute, run.ranks, loader, resume_by_skipping) if loader is not None else None
    progress = run.progress
    if progress.stopped_by is not None:
        if state is not None:
            set_random_state(state["random"])  # for what the script does next
        return
    run.data, run.total_steps = train, count_steps(cfg, train)
    restore_random = open_data(train, state)
    announce_data(cfg, run)
    run.console.expect(run.total_steps)

    with signals:
        begin(cfg, run, None)
        stream: Iterator[Any] = (
            train.steps(progress, restore_random) if train is not None else without_data(restore_random)
        )
        run.in_steps = True
        try:
            for batch in stream:
                begin_step(run, batch)
                given = progress.step if train is None else batch if cfg.accumulate_grad_batches > 1 else batch[0][0]
                try:
                    yield given
                except GeneratorExit:  # a break: this step was made too
                    count_batches(run, batch, train is not None and train.at_end)
                    raise
                epoch_ended = train is not None and train.at_end
                if end_step(cfg, run, batch, epoch_ended, None, signals, progress.stopped_by):
                    break
        finally:
            run.in_steps = False
        if cfg.checkpoint is not None:  # now: what the script does before it calls `finish` may take long, or fail
            save_and_tell(cfg, run, wait=True)


def is_last_step(cfg: Settings, run: Run, epoch_ends: bool) -> bool:
    """Whether a duration is over with the step that is running."""
    steps_over = cfg.max_steps is not None and run.progress.step >= cfg.max_steps
    epochs_over = cfg.max_epochs is not None and run.progress.epoch + epoch_ends >= cfg.max_epochs
    return steps_over or epochs_over or (cfg.max_time is not None and run.seconds >= cfg.max_time)


def backward_alone(cfg: Settings, run: Run, step: Step, numbered: bool, parts: StepBatch, prefix: str) -> Any:
    """Add the gradients of one loss to what the parameters hold already: only they are divided by the counts of its parts."""
    if cfg.accumulate_grad_batches == 1 and cfg.micro_batch_size is None and run.ranks is None:
        return backward_of(run)(cfg, run, step, numbered, parts, prefix)
    held = [(parameter, parameter.grad) for parameter in run.model.parameters() if parameter.grad is not None]
    for parameter, _ in held:
        parameter.grad = None
    output = backward_of(run)(cfg, run, step, numbered, parts, prefix)
    for parameter, gradient in held:
        parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
    return output


def apply_one(cfg: Settings, run: Run, optimizer: Optimizer) -> None:
    """Update the parameters of one of several optimizers, and move its scheduler."""
    name = next(name for name, own in run.optimizers.items() if own is optimizer)
    before = run.progress.scale
    apply(cfg, run, optimizer, run.schedulers.get(name))
    if cfg.precision == "16-mixed" and run.progress.scale != before:
        # Gradients that wait for another optimizer carry the factor from before.
        scale_gradients(run, run.progress.scale / before)


def without_data(restore_random: Callable[[], None] | None) -> Iterator[Any]:
    """Stand in for the data of a loop that has none: put the random states back where a checkpoint had them, and go on."""
    if restore_random is not None:
        restore_random()
    yield from itertools.repeat(None)


class Loop:
    """A run whose loop is yours: `Trainer.start` makes one. It counts, logs, saves, stops and resumes as `fit` does.

    Example:
        run = trainer.start(gan, optimizers={"d": opt_d, "g": opt_g})
        for batch in run.steps(train_loader):
            run.update(opt_d, d_step, batch)
            run.update(opt_g, g_step, batch)
        run.finish()
    """

    def __init__(self, cfg: Settings, run: Run, state: dict[str, Any] | None) -> None:
        self._cfg, self._run, self._state = cfg, run, state
        self._numbered: dict[int, tuple[Step, bool]] = {}  # by the id of a step: whether it takes the step's number
        self._evaluations: dict[tuple[int, int], Evaluation | None] = {}  # by the ids of a step and its loader
        self._signals = StopSignals()
        self._session = Session(run)
        self._session.__enter__()
        self._finished = False
        self._stepped_once: set[Optimizer] = set()
        self._hooks = [optimizer.register_step_post_hook(self._stepped) for optimizer in run.optimizers.values()]
        self._error = getattr(sys, "last_value", None)
        atexit.register(self._left_unfinished)

    def __enter__(self) -> Loop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self._close(error)

    def _close(self, error: BaseException | None) -> None:
        atexit.unregister(self._left_unfinished)
        self._finished = True
        self._signals.__exit__(None, None, None)  # of steps that were left, and whose iterator is still held
        for hook in self._hooks:
            hook.remove()
        self._session.__exit__(type(error) if error is not None else None, error, None)

    def _stepped(self, optimizer: Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note the first step of an optimizer, made by `apply` or by hand."""
        self._stepped_once.add(optimizer)
        self._hooks[list(self._run.optimizers.values()).index(optimizer)].remove()

    def _left_unfinished(self) -> None:
        """End a run whose script ended without `finish`; after an error only close it."""
        if getattr(sys, "last_value", None) is not self._error:
            self._close(sys.last_value)
            return
        warnings.warn(
            "The script ended without run.finish(), which is done now. Call it behind the loop, or write `with trainer.start(...) as run:`.",
            SheerWarning,
            stacklevel=user_level(),
        )
        self.finish()

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
    def is_last(self) -> bool:
        """Whether the step that is running is the last, because a duration is over with it."""
        return is_last_step(self._cfg, self._run, self.epoch_ends)

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
        state, self._state = self._state, None
        yield from own_steps(self._cfg, self._run, self._signals, state, loader, resume_by_skipping)
        if self._signals.received is not None or is_signal(self._run.progress.stopped_by):
            self.finish()

    def update(self, optimizer: Optimizer, step: Step, batch: Any) -> Any:
        """Train on a batch: forward, backward, clip, update, clear; returns what the step returned.

        What other optimizers' losses left in these parameters' gradients is dropped first. With several optimizers the metrics
        are logged as `train/<optimizer>/<name>`.
        """
        self._refuse_outside("update")
        self._known(optimizer).zero_grad()
        try:
            output = self.backward(step, batch, optimizer)
            self.apply(optimizer)
        except Exception as error:
            self._session.tell(error)
            raise
        return output

    def backward(self, step: Step, batch: Any, optimizer: Optimizer | None = None) -> Any:
        """Add the gradients of a step's loss to what the parameters hold; returns what the step returned."""
        run = self._run
        self._refuse_outside("backward")
        parts = self._with_samples(batch)
        name = next((name for name, own in run.optimizers.items() if own is optimizer), None)
        prefix = f"{name}/" if name is not None and len(run.optimizers) > 1 else ""
        return backward_alone(self._cfg, run, step, self._takes_number(step), parts, prefix)

    def apply(self, optimizer: Optimizer) -> None:
        """Clip the gradients of an optimizer's parameters, update them, clear the gradients, and move its scheduler."""
        self._refuse_outside("apply")
        apply_one(self._cfg, self._run, self._known(optimizer))

    def log(self, metrics: Mapping[str, Any], samples: int = 1) -> None:
        """Add values to the metrics of training, to be logged as `train/<name>` at the next log point."""
        self._run.metrics.add(metrics, samples)

    def evaluate(self, step: Step, loader: Any) -> dict[str, float]:
        """Validate: run the step over all batches, log `val/<name>`, tell the callbacks, and let the best checkpoint be kept."""
        run, key = self._run, (id(step), id(loader))
        if key not in self._evaluations:  # what it holds keeps both alive, so their ids stay theirs
            self._evaluations[key] = evaluation_of(self._cfg, run.model, step, loader)
        evaluation = self._evaluations[key]
        if evaluation is None:
            return {}
        ends = run.in_steps and self.epoch_ends
        run.progress.epoch += ends  # as in `fit`, where a step that ends an epoch is counted before the validation
        stop = validate(self._cfg, run, evaluation)
        run.progress.epoch -= ends
        run.progress.stopped_by = stop or run.progress.stopped_by
        return dict(run.progress.metrics)

    def finish(self) -> Result:
        """End the run: log what is left, save, close the loggers."""
        progress = self._run.progress
        if not self._finished:
            if progress.step > self._run.info.start_step:
                self._warn_of_unused()
                progress.stopped_by = progress.stopped_by or "break"
                if self._run.metrics and not is_signal(progress.stopped_by):
                    log_training(self._cfg, self._run)
                finish(self._cfg, self._run, None, saved=progress.saved_at == progress.step)
            self._close(None)
            leave_if_told(self._run, self._signals)
        return result_of(self._run)

    def _warn_of_unused(self) -> None:
        """Warn of what was given and never used: an optimizer, or a metric to monitor."""
        run = self._run
        said = [
            f"The optimizer {name!r} was never used: it never made a step. Its parameters are as they were."
            for name, optimizer in run.optimizers.items()
            if optimizer not in self._stepped_once and not optimizer.state and not run.progress.skipped
        ]
        if self._cfg.monitor is not None and run.progress.validated_at < 0:
            said.append(
                f"monitor={self._cfg.monitor!r} is a metric of the validation, and there was none: call run.evaluate in the loop."
            )
        for warning in said:
            warnings.warn(warning, SheerWarning, stacklevel=user_level())

    def _takes_number(self, step: Step) -> bool:
        """Whether a step function takes the step's number; looked up once for each."""
        known = self._numbered.get(id(step))
        if known is None:
            known = self._numbered[id(step)] = (step, takes_step_number(step, model=self._run.model))
        return known[1]

    def _refuse_outside(self, method: str) -> None:
        if not self._run.in_steps:
            raise RunError(
                f"run.{method} belongs inside the loop, `for batch in run.steps(loader):`, which counts its steps; outside of it nothing does."
            )

    def _with_samples(self, batch: Any) -> StepBatch:
        """Return a batch with its number of samples, which is known from the order where it is the one that `steps` yielded."""
        if isinstance(batch, StepBatch):
            return batch
        yielded = self._run.data.yielded if self._run.data is not None else None
        if yielded is not None and len(yielded) == 1 and batch is yielded[0][0]:
            return yielded
        return alone_or_counted(batch, self._run.ranks)

    def _known(self, optimizer: Optimizer) -> Optimizer:
        if not any(own is optimizer for own in self._run.optimizers.values()):
            raise SettingsError(
                f"This optimizer is not one of those the run was started with: {', '.join(self._run.optimizers)}."
            )
        return optimizer
