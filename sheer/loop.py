"""The loop: `fit`, what is due at the end of each step, and the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sheer.build import make_compute, refuse_closure, resolve_device, takes_step_number
from sheer.checks import check_monitor, refuse_unfollowed, try_validation
from sheer.console import clock
from sheer.data.batch import StepBatch
from sheer.due import duration_over, save_is_due, validation_is_due
from sheer.evaluation import Evaluation, evaluate
from sheer.loss import Step
from sheer.metrics import Media, put_back
from sheer.plugins import Plugins
from sheer.resume import open_data
from sheer.run import Run
from sheer.saving import save_checkpoint
from sheer.session import Session, leave_if_told
from sheer.settings import Settings
from sheer.signals import StopSignals, is_signal
from sheer.start import evaluation_of, start_run, training_data
from sheer.step import apply, backward


def fit(
    cfg: Settings,
    plugins: Plugins,
    model: nn.Module,
    step_function: Step,
    train_loader: Any,
    val_loader: Any,
    eval_function: Step,
    optimizer: Optimizer | Callable[[nn.Module], Optimizer],
    scheduler: Any,
    resume_by_skipping: bool,
) -> Run:
    """Train the model."""
    compute = make_compute(cfg.precision, resolve_device(cfg.device))
    train = training_data(cfg, compute, train_loader, resume_by_skipping)
    validation = evaluation_of(cfg, model, eval_function, val_loader)
    refuse_unfollowed(cfg, validation, scheduler)
    numbered = takes_step_number(step_function, model=model)
    optimizers, schedulers = {"optimizer": optimizer}, {"optimizer": scheduler}
    run, state = start_run(cfg, plugins, compute, model, optimizers, schedulers, train)
    progress, optimizer, scheduler = run.progress, run.optimizers["optimizer"], run.schedulers.get("optimizer")
    if state is not None and progress.stopped_by is not None:
        return run
    refuse_closure(optimizer)
    restore_random = open_data(train, state)

    with Session(run), StopSignals() as signals:
        begin(cfg, run, validation)
        for batch in train.steps(progress, restore_random):
            begin_step(run, batch)
            backward(cfg, run, step_function, numbered, batch)
            apply(cfg, run, optimizer, scheduler)
            if end_step(cfg, run, batch, train.at_end, validation, signals):
                break
        finish(cfg, run, validation)
    leave_if_told(run, signals)
    return run


def begin(cfg: Settings, run: Run, validation: Evaluation | None) -> None:
    """Do what comes before the first step: tell the callbacks, try the validation, and validate if that is wanted."""
    for callback in run.events.fit_start:
        callback.on_fit_start(run.model, run.optimizers, run.info)
    if validation is not None:
        try_validation(cfg, run, validation)
    if cfg.validate_first and validation is not None and run.progress.step == 0:
        validate(cfg, run, validation)
    if run.progress.batch == 0:
        begin_epoch(run)


def begin_epoch(run: Run) -> None:
    """Tell the callbacks that an epoch begins."""
    for callback in run.events.epoch_start:
        callback.on_epoch_start(run.progress.epoch, run.model)


def begin_step(run: Run, batch: StepBatch | None) -> None:
    """Count the step that begins, and tell the callbacks."""
    run.progress.step += 1
    for callback in run.events.step_start:
        callback.on_step_start(run.progress.step, run.model, batch)


def end_step(
    cfg: Settings,
    run: Run,
    batch: StepBatch | None,
    epoch_ended: bool,
    validation: Evaluation | None,
    signals: StopSignals,
    told: str | None = None,
) -> bool:
    """Count what was trained on, then do what is due: log, validate, tell the callbacks, save. Returns whether this step was the last.

    `told` says why it is to be the last, if that was decided in it.
    """
    progress = run.progress
    count_batches(run, batch, epoch_ended)
    stop = duration_over(cfg, run)
    if told is not None and stop is None:
        stop = told

    if stop is not None or progress.step % cfg.log_every_n_steps == 0:
        log_training(cfg, run)
    if validation is not None and (stop is not None or validation_is_due(cfg, progress.step, epoch_ended)):
        by_validation = validate(cfg, run, validation)
        stop = by_validation or stop
    for callback in run.events.step_end:
        stop = callback.on_step_end(progress.step, run.model) or stop
    if epoch_ended:
        by_epoch = end_epoch(cfg, run)
        stop = by_epoch or stop

    if signals.received is not None and stop is None:
        stop = signals.received
    if stop is not None:
        progress.stopped_by = stop
        return True
    if cfg.checkpoint is not None and save_is_due(cfg, run, epoch_ended):
        save_and_tell(cfg, run)
    if epoch_ended:
        begin_epoch(run)
    return False


def count_batches(run: Run, batch: StepBatch | None, epoch_ended: bool) -> None:
    """Count what a step was trained on."""
    progress = run.progress
    progress.batch += len(batch or ())
    progress.samples += sum([samples for _, samples in batch or ()])
    if epoch_ended:
        progress.epoch += 1
        progress.batch = 0


def end_epoch(cfg: Settings, run: Run) -> str | None:
    """Move the schedules that count epochs, and tell the callbacks. Returns why the run is to stop, or None."""
    if cfg.scheduler_interval == "epoch":
        for scheduler in run.schedulers.values():
            scheduler.step()
    stop = None
    for callback in run.events.epoch_end:
        stop = callback.on_epoch_end(run.progress.epoch - 1, run.model) or stop
    return stop


def log_training(cfg: Settings, run: Run) -> None:
    """Read what the steps since the last log point returned, and hand it to the loggers. The host waits for the device here."""
    if cfg.nonfinite == "raise":
        run.watch.check()
    logged = {f"train/{name}": value for name, value in run.metrics.read().items()}
    for callback in run.events.log:
        logged.update(callback.on_log(run.progress.step, logged) or {})
    if run.progress.validated_at < 0:
        run.progress.metrics = logged
    report(run, logged)
    media = {f"train/{name}": value for name, value in run.metrics.take_media().items()}
    run.loggers.log_media(run.progress.step, media)


def validate(cfg: Settings, run: Run, validation: Evaluation) -> str | None:
    """Validate, report it, and tell the schedulers and callbacks that follow it. Returns why the run is to stop, or None."""
    set_aside = run.metrics.set_aside()
    media: dict[str, Media] = {}
    measured = evaluate(run.model, validation, run.compute, run.events, run.progress.step, media)
    put_back(set_aside)
    check_monitor(cfg, run, measured)
    run.progress.metrics = measured
    run.progress.validated_at = run.progress.step
    report(run, measured)
    run.loggers.log_media(run.progress.step, media)

    for plateau in run.plateaus.values():
        plateau.step(measured[cfg.monitor or ""])
    if cfg.scheduler_interval == "validation":
        for scheduler in run.schedulers.values():
            scheduler.step()
    stop = None
    for callback in run.events.validation_end:
        stop = callback.on_validation_end(run.progress.step, measured) or stop
    return stop


def report(run: Run, metrics: dict[str, float]) -> None:
    """Hand metrics to the loggers and the console."""
    record = {"epoch": run.progress.epoch, **metrics}
    run.loggers.log(run.progress.step, record)
    run.console.log(run.progress.step, record)
    run.progress.saved_at = -1


def save_and_tell(cfg: Settings, run: Run) -> None:
    """Save, and tell the callbacks."""
    path = save_checkpoint(cfg, run)
    run.progress.saved_at = run.progress.step
    for callback in run.events.save:
        callback.on_save(run.progress.step, path)


def finish(cfg: Settings, run: Run, validation: Evaluation | None, saved: bool = False) -> None:
    """End a run: log and validate where the callback that stopped it did so between two points, save, tell the callbacks.

    One that goes on later is only saved. `saved` says that it is already.
    """
    progress, events = run.progress, run.events
    goes_on = is_signal(progress.stopped_by)
    if (events.validation_end or events.step_end or events.epoch_end) and not goes_on:
        if run.metrics:
            log_training(cfg, run)
        if validation is not None and progress.validated_at != progress.step:
            validate(cfg, run, validation)
    if cfg.checkpoint is not None and not saved:
        save_and_tell(cfg, run)
    for callback in run.events.fit_end:
        callback.on_fit_end(progress.step, run.model)
    if not goes_on:
        run.console.say(
            f"done: {progress.stopped_by} after step {progress.step:,} and {clock(run.seconds)}; {run.info.run_dir}"
        )
