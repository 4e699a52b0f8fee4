"""The loop: `fit`, one's own loop, what is due at the end of each step, and the end of a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sheer.build import refuse_closure
from sheer.checks import check_monitor, refuse_unfollowed, try_validation
from sheer.console import clock
from sheer.data.batch import StepBatch
from sheer.due import duration_over, save_is_due, validation_is_due
from sheer.evaluation import Evaluation, evaluate
from sheer.metrics import put_back
from sheer.plugins import Plugins
from sheer.random import set_random_state
from sheer.run import Run
from sheer.saving import save
from sheer.session import Session, leave_if_told
from sheer.settings import Settings
from sheer.signals import is_signal
from sheer.start import evaluation_of, numbered, start, total_steps, training_data
from sheer.step import Step, apply, backward


def fit(
    cfg: Settings,
    plugins: Plugins,
    model: nn.Module,
    step: Step,
    train_loader: Any,
    val_loader: Any,
    eval_step: Step,
    optimizer: Optimizer | Callable[[nn.Module], Optimizer],
    scheduler: Any,
    resume_by_skipping: bool,
) -> Run:
    """Train until a duration is over, a callback stops the run, or a signal does."""
    train = training_data(cfg, train_loader, resume_by_skipping=resume_by_skipping)
    validation = evaluation_of(cfg, model, eval_step, val_loader)
    refuse_unfollowed(cfg, validation, scheduler)
    optimizers, schedulers = {"optimizer": optimizer}, {"optimizer": scheduler}
    run = start(cfg, plugins, model, optimizers, schedulers, train, numbered(model, step))
    progress, optimizer, scheduler = run.progress, run.optimizers["optimizer"], run.schedulers.get("optimizer")
    if progress.stopped_by is not None:
        return run
    refuse_closure(optimizer)
    restore_random = run.open_data(train)
    with Session(run) as session:
        begin(cfg, run, validation)
        for batch in train.steps(progress, restore_random):
            progress.step, run.batch = progress.step + 1, batch
            for callback in run.events.step_start:
                callback.on_step_start(progress.step, model, batch)
            backward(cfg, run, step, batch)
            apply(cfg, run, optimizer, scheduler)
            if end_step(cfg, run, batch, validation, session):
                break
        finish(cfg, run, validation)
    leave_if_told(run, session.signals.received)
    return run


def steps(cfg: Settings, run: Run, session: Session, loader: Any, resume_by_skipping: bool) -> Iterator[Any]:
    """Yield the batches of one's own loop, on the device, and do after each what is due; without a loader, the step's number."""
    train = training_data(cfg, loader, resume_by_skipping=resume_by_skipping) if loader is not None else None
    progress = run.progress
    if progress.stopped_by is not None:
        return
    run.total_steps = total_steps(cfg, train)
    run.console.expect(run.total_steps)
    begin(cfg, run, None)
    stream = train.steps(progress, run.open_data(train)) if train is not None else without_data(run)
    for batch in stream:
        progress.step, run.batch = progress.step + 1, batch
        for callback in run.events.step_start:
            callback.on_step_start(progress.step, run.model, batch)
        try:
            if batch is None:
                yield progress.step
            else:
                yield batch if cfg.accumulate_grad_batches > 1 else batch[0][0]
        except GeneratorExit:  # a break: this step was made too
            count_batches(run, batch)
            raise
        if end_step(cfg, run, batch, None, session):
            break
    if is_signal(progress.stopped_by):
        finish(cfg, run, None)
        session.__exit__(None, None, None)
        leave_if_told(run, session.signals.received)


def without_data(run: Run) -> Iterator[None]:
    """Stand in for the data of a loop that has none: put the random states back where a checkpoint had them, and go on."""
    if run.restored is not None:
        set_random_state(run.restored["random"])
        run.restored = None
    yield from itertools.repeat(None)


def begin(cfg: Settings, run: Run, validation: Evaluation | None) -> None:
    """What comes before the first step: the callbacks, a try of the validation, and a first one if that is wanted."""
    for callback in run.events.fit_start:
        callback.on_fit_start(run.model, run.optimizers, run.info)
    if validation is not None:
        try_validation(cfg, run, validation)
    if cfg.validate_first and validation is not None and run.progress.step == 0:
        validate(cfg, run, validation)
    if run.progress.batch == 0:
        for starter in run.events.epoch_start:
            starter.on_epoch_start(run.progress.epoch, run.model)


def end_step(cfg: Settings, run: Run, batch: StepBatch | None, validation: Evaluation | None, session: Session) -> bool:
    """Count the step, then do what is due: log, validate, callbacks, save. Returns whether it was the last."""
    progress, events = run.progress, run.events
    at_end = count_batches(run, batch)
    stop = duration_over(cfg, run) or progress.stopped_by

    if progress.step % cfg.log_every_n_steps == 0 or stop is not None:
        log_training(cfg, run)
    if validation is not None and validation_is_due(cfg, progress.step, at_end):
        stop = validate(cfg, run, validation) or stop
    for callback in events.step_end:
        stop = callback.on_step_end(progress.step, run.model) or stop
    if at_end:
        for scheduler in run.schedulers.values() if cfg.scheduler_interval == "epoch" else ():
            scheduler.step()
        for ender in events.epoch_end:
            stop = ender.on_epoch_end(progress.epoch - 1, run.model) or stop
    progress.stopped_by = stop or session.signals.received
    if progress.stopped_by is None and cfg.checkpoint is not None and save_is_due(cfg, run, at_end):
        save_and_tell(cfg, run)
    if at_end and progress.stopped_by is None:
        for starter in events.epoch_start:
            starter.on_epoch_start(progress.epoch, run.model)
    return progress.stopped_by is not None


def count_batches(run: Run, batch: StepBatch | None) -> bool:
    """Count what a step was trained on. Returns whether an epoch ended with it."""
    progress, at_end = run.progress, run.data is not None and run.data.at_end
    for _, samples in batch or ():
        progress.batch, progress.samples = progress.batch + 1, progress.samples + samples
    if at_end:
        progress.epoch, progress.batch = progress.epoch + 1, 0
    return at_end


def save_and_tell(cfg: Settings, run: Run) -> None:
    """Save, and tell the callbacks."""
    run.saved = save(cfg, run)
    for callback in run.events.save:
        callback.on_save(run.progress.step, run.saved)


def log_training(cfg: Settings, run: Run) -> None:
    """Read what the steps since the last log point returned, and hand it to the loggers. The host waits for the device here."""
    if cfg.nonfinite == "raise":
        run.watch.check()
    metrics = {f"train/{name}": value for name, value in run.metrics.read().items()}
    for callback in run.events.log:
        metrics.update(callback.on_log(run.progress.step, metrics) or {})
    if run.validated_at < 0:
        run.last_metrics = metrics
    report(run, metrics)
    run.loggers.log_media(
        run.progress.step, {f"train/{name}": value for name, value in run.metrics.take_media().items()}
    )


def report(run: Run, metrics: dict[str, float]) -> None:
    """Hand metrics to the loggers and the console."""
    record = {"epoch": run.progress.epoch, **metrics}
    run.loggers.log(run.progress.step, record)
    run.console.log(run.progress.step, record)


def validate(cfg: Settings, run: Run, validation: Evaluation) -> str | None:
    """Validate, report it, and tell the schedulers and callbacks that follow it. Returns why the run is to stop, or None."""
    set_aside = run.metrics.set_aside()
    metrics, media = evaluate(run.model, validation, run.compute, run.events, run.progress.step)
    put_back(set_aside)
    check_monitor(cfg, run, metrics)
    run.last_metrics, run.validated_at = metrics, run.progress.step
    report(run, metrics)
    run.loggers.log_media(run.progress.step, media)
    for plateau in run.plateaus.values():
        plateau.step(metrics[cfg.monitor or ""])
    for scheduler in run.schedulers.values() if cfg.scheduler_interval == "validation" else ():
        scheduler.step()
    stop = None
    for callback in run.events.validation_end:
        stop = callback.on_validation_end(run.progress.step, metrics) or stop
    return stop


def finish(cfg: Settings, run: Run, validation: Evaluation | None) -> None:
    """End a run: validate where its last step was not, save, tell the callbacks. One that goes on later is only saved."""
    progress = run.progress
    progress.stopped_by = progress.stopped_by or "break"
    if not is_signal(progress.stopped_by):
        if run.metrics:
            log_training(cfg, run)
        if validation is not None and run.validated_at != progress.step:
            validate(cfg, run, validation)
    if cfg.checkpoint is not None:
        save_and_tell(cfg, run)
    for callback in run.events.fit_end:
        callback.on_fit_end(progress.step, run.model)
    run.console.say(
        f"done: {progress.stopped_by} after step {progress.step:,} and {clock(run.seconds)}; {run.info.run_dir}"
    )
