"""The loop: `fit`, what is due at the end of each step, and the end of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sheer.build import make_compute, refuse_closure, resolve_device, takes_step_number
from sheer.checks import check_monitor, metrics_in, refuse_unfollowed, try_validation
from sheer.console import clock
from sheer.data.batch import StepBatch
from sheer.distributed.agree import agreed, first_of, gathered
from sheer.distributed.mesh import form_ranks
from sheer.distributed.steps import evaluator_of, let_go
from sheer.distributed.wrap import Parallelize
from sheer.due import asked_for, duration_over, save_is_due, validation_is_due
from sheer.errors import BadStepsError
from sheer.evaluation import Evaluation, evaluate
from sheer.events import end_anywhere, end_by_callbacks
from sheer.garbage import collect_if_due
from sheer.leaving import Told, before_validation
from sheer.loss import Step
from sheer.memory import agree_on_parts, smaller_parts, train_again
from sheer.metrics import Media, contents, put_back
from sheer.plugins import Plugins
from sheer.random import set_random_state
from sheer.resume import open_data, warn_of_changes
from sheer.rollback import go_back, note_step
from sheer.run import Run
from sheer.saving import look_back, prepare_memory, save_checkpoint
from sheer.session import Session, leave_if_told
from sheer.settings import Rollback, Settings
from sheer.signals import StopSignals, is_signal
from sheer.speed.graph import graphs_of, made_by_graph, settle_graphs
from sheer.start import evaluation_of, start_run, training_data
from sheer.step import apply, backward_of


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
    parallelize: Parallelize,
    resume_by_skipping: bool,
) -> Run:
    """Train the model."""
    compute = make_compute(cfg.precision, resolve_device(cfg.device))
    ranks = form_ranks(cfg.parallel, compute.device, plugins.mesh)
    train = training_data(cfg, compute, ranks, train_loader, resume_by_skipping)
    validation = evaluation_of(cfg, model, eval_function, val_loader)
    refuse_unfollowed(cfg, validation, scheduler)
    numbered = takes_step_number(step_function, model=model)
    if cfg.compile and cfg.compile != "blocks" and ranks is None:  # the loss, too: logits need not be written and read
        step_function = torch.compile(step_function, mode=None if cfg.compile is True else cfg.compile)
    optimizers, schedulers = {"optimizer": optimizer}, {"optimizer": scheduler}
    run, state = start_run(cfg, plugins, compute, ranks, model, parallelize, optimizers, schedulers, train)
    progress, optimizer, scheduler = run.progress, run.optimizers["optimizer"], run.schedulers.get("optimizer")
    if state is not None and progress.stopped_by is not None:
        set_random_state(state["random"])  # for what the script does next
        return run
    refuse_closure(optimizer)
    train_on = backward_of(run)
    if cfg.cuda_graph:
        run.graphs = graphs_of(cfg, run, optimizer, numbered)
    restore_random = open_data(train, state)

    with Session(run), StopSignals() as signals:
        begin(cfg, run, validation)
        let_validations_be_left(cfg, run, validation, signals)
        if isinstance(cfg.nonfinite, Rollback):
            save_start(cfg, run, restore_random)
        for batch in train.steps(progress, restore_random):
            begin_step(run, batch)
            parts = batch if progress.micro_batch_size is None else smaller_parts(batch, progress.micro_batch_size)
            if not (cfg.cuda_graph and made_by_graph(cfg, run, step_function, parts, optimizer, scheduler)):
                try:
                    train_on(cfg, run, step_function, numbered, parts)
                except torch.OutOfMemoryError as error:
                    train_again(cfg, run, train_on, step_function, numbered, batch, error)
                apply(cfg, run, optimizer, scheduler)
            if isinstance(cfg.nonfinite, Rollback):
                if end_or_go_back(cfg, run, batch, train.at_end, validation, signals):
                    break
            elif end_step(cfg, run, batch, train.at_end, validation, signals):
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
    # Of a run that may go back, step 0 is saved behind that validation.
    not_validated = not isinstance(cfg.nonfinite, Rollback) or run.progress.validated_at < 0
    if cfg.validate_first and validation is not None and run.progress.step == 0 and not_validated:
        validate(cfg, run, validation)
    if run.progress.batch == 0 and not run.progress.owes_validation:
        begin_epoch(run)
    warn_of_changes(run)


def let_validations_be_left(cfg: Settings, run: Run, validation: Evaluation | None, signals: StopSignals) -> None:
    """Let a validation be left in its middle when the run is told to stop, and end the step that an earlier session left so."""
    if cfg.checkpoint is not None:
        run.told = Told(signals, run.agreement)
        run.leave = functools.partial(leave_validation, cfg, run, run.told)
    if run.progress.owes_validation and run.data is not None:
        run.metrics.hold(metrics_in(run.model))
        run.data.owed = functools.partial(end_owed_step, cfg, run, validation, signals)


def leave_validation(cfg: Settings, run: Run, told: Told) -> None:
    """Save the run as it was before the validation that was left."""
    assert run.before_validating is not None
    if run.stepper is not None:
        let_go(run.stepper)
    run.before_validating.restore(run.model)
    run.progress.owes_validation, run.progress.stopped_by = True, told.reason
    finish(cfg, run, None)


def end_owed_step(cfg: Settings, run: Run, validation: Evaluation | None, signals: StopSignals) -> bool:
    """Do what was to come in the step that an earlier session left in its validation, which is run whole."""
    epoch_ended = run.progress.batch == 0
    run.progress.epoch -= epoch_ended  # it is counted again
    run.progress.owes_validation, run.ends_owed = False, True
    is_over = end_step(cfg, run, None, epoch_ended, validation, signals)
    run.ends_owed = False
    return is_over


def remember(run: Run) -> None:
    """Note what a validation may change, if it may be left: not one that comes behind the last step."""
    if run.progress.stopped_by is not None:
        run.told = None
    if run.told is not None:
        run.before_validating = before_validation(run.model, contents(run.metrics.objects()))


def begin_epoch(run: Run) -> None:
    """Tell the callbacks that an epoch begins."""
    for callback in run.events.epoch_start:
        callback.on_epoch_start(run.progress.epoch, run.model)


def begin_step(run: Run, batch: StepBatch | None) -> None:
    """Count the step that begins, and tell the callbacks."""
    run.progress.step += 1
    run.metrics.in_step.clear()
    if run.rewind is not None:
        run.rewind.take()
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

    if (stop is not None or progress.step % cfg.log_every_n_steps == 0) and not run.ends_owed:
        log_training(cfg, run)
    if validation is not None and (stop is not None or validation_is_due(cfg, progress.step, epoch_ended)):
        by_validation = validate(cfg, run, validation)
        stop = by_validation or stop
    for callback in run.events.step_end:
        stop = asked_for(run, callback.on_step_end(progress.step, run.model)) or stop
    if epoch_ended:
        by_epoch = end_epoch(cfg, run)
        stop = by_epoch or stop

    if run.agreement is not None:
        stop = run.agreement.heard(stop, signals.received)
    elif signals.received is not None and stop is None:
        stop = signals.received
    if stop is not None:
        progress.stopped_by = stop
        return True
    if progress.step == run.info.start_step + 1:
        prepare_memory(cfg, run)
    if run.saver.writing is not None and is_saved(cfg, run):
        tell_of_save(run)
    if cfg.checkpoint is not None and save_is_due(cfg, run, epoch_ended):
        save_and_tell(cfg, run, wait=not cfg.checkpoint.asynchronous)
    if epoch_ended:
        begin_epoch(run)
    return False


def save_start(cfg: Settings, run: Run, restore_random: Callable[[], None] | None) -> None:
    """Save the run as it begins, if it has no checkpoint yet: it may have to go back before the first that is due."""
    if agreed(run.ranks, bool(run.saver.saves)):
        return
    if restore_random is not None:
        restore_random()
    run.console.say(f"rollback: step {run.progress.step:,} is saved, to have a checkpoint to go back to")
    save_and_tell(cfg, run, wait=True)


def end_or_go_back(
    cfg: Settings, run: Run, batch: StepBatch, epoch_ended: bool, validation: Evaluation | None, signals: StopSignals
) -> bool:
    """End a step as `end_step` does; where a step is found to be bad, go back to a checkpoint from before it. Returns whether this step was the last."""
    found: BadStepsError | None = None
    note_step(run, batch, epoch_ended)
    try:
        is_over = end_step(cfg, run, batch, epoch_ended, validation, signals)
        if is_over:
            look_back(run)
        return is_over
    except BadStepsError as error:
        found = error
    tell_of_save(run)  # of the checkpoint that is being written, which is good
    go_back(cfg, run, found)
    save_and_tell(cfg, run, wait=True)  # so that a run that is killed knows what to leave out
    if run.progress.batch == 0:
        begin_epoch(run)
    return False


def count_batches(run: Run, batch: StepBatch | None, epoch_ended: bool) -> None:
    """Count what a step was trained on."""
    progress = run.progress
    if batch is not None:
        progress.batch += len(batch)
        if run.ranks is not None:
            progress.samples += batch.total
        else:
            progress.samples += batch[0][1] if len(batch) == 1 else sum([samples for _, samples in batch])
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
    return first_of(run.ranks, stop)


def log_training(cfg: Settings, run: Run) -> None:
    """Read what the steps since the last log point returned, and hand it to the loggers. The host waits for the device here."""
    if cfg.cuda_graph:
        settle_graphs(run)
    run.metrics.send()
    if cfg.nonfinite == "raise":
        run.watch.check(run.ranks)
    if isinstance(cfg.nonfinite, Rollback):
        look_back(run, weights=False)
    agree_on_parts(run)
    logged = {f"train/{name}": value for name, value in run.metrics.read(run.ranks).items()}
    for callback in run.events.log:
        logged.update(callback.on_log(run.progress.step, logged) or {})
    if isinstance(cfg.nonfinite, Rollback) and run.progress.rollbacks > 0:
        logged["rollbacks"] = float(run.progress.rollbacks)
    if run.progress.validated_at < 0:
        run.progress.metrics = logged
    report(run, logged)
    media = {f"train/{name}": value for name, value in run.metrics.take_media().items()}
    run.loggers.log_media(run.progress.step, media)
    report_recompilations(run)
    collect_if_due()


def validate(cfg: Settings, run: Run, validation: Evaluation) -> str | None:
    """Validate, report it, and tell the schedulers and callbacks that follow it. Returns why the run is to stop, or None."""
    if isinstance(cfg.nonfinite, Rollback):
        look_back(run)
    remember(run)
    set_aside = run.metrics.set_aside()
    media: dict[str, Media] = {}
    measured = evaluate(
        run.model,
        validation,
        run.compute,
        run.events,
        run.progress.step,
        media,
        run.ranks,
        evaluator_of(run.stepper, run.ranks),
        run.told,
    )
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
    return first_of(run.ranks, stop)


def report(run: Run, measured: dict[str, float]) -> None:
    """Hand metrics to the loggers and the console."""
    record = {"epoch": run.progress.epoch, **measured}
    run.loggers.log(run.progress.step, record)
    run.console.log(run.progress.step, record)
    run.progress.saved_at = -1


def report_recompilations(run: Run) -> None:
    """Say what was compiled again since the last log point."""
    for sentence in run.compilations.news():
        run.console.say(sentence)


def save_and_tell(cfg: Settings, run: Run, *, wait: bool) -> None:
    """Save, and tell the callbacks: now, or when training has gone on and the checkpoint is written."""
    tell_of_save(run)  # of the one before, which is waited for
    save_checkpoint(cfg, run, wait=wait)
    run.progress.saved_at = run.progress.step
    if wait:
        tell_of_save(run)


def is_saved(cfg: Settings, run: Run) -> bool:
    """Whether the checkpoint that is being written is written; several ranks ask each other at log points."""
    if run.ranks is None or run.saver.has_failed:
        return run.saver.is_written
    return run.progress.step % cfg.log_every_n_steps == 0 and all(gathered(run.saver.is_written))


def tell_of_save(run: Run) -> None:
    """Wait until the checkpoint that is being written, if any, is committed, and tell the callbacks."""
    written = run.saver.wait()
    if written is not None:
        agreed(run.ranks, None)  # rank 0 commits
        for callback in run.events.save:
            callback.on_save(*written)


def finish(cfg: Settings, run: Run, validation: Evaluation | None, saved: bool = False) -> None:
    """End a run: log and validate where the callback that stopped it did so between two points, save, tell the callbacks.

    One that goes on later is only saved. `saved` says that it is already.
    """
    progress, events = run.progress, run.events
    goes_on = is_signal(progress.stopped_by)
    if end_by_callbacks(events) and not goes_on:
        if cfg.cuda_graph:
            settle_graphs(run)
        if run.metrics:
            log_training(cfg, run)
        if validation is not None and end_anywhere(events) and progress.validated_at != progress.step:
            validate(cfg, run, validation)
    if cfg.checkpoint is not None and not saved:
        save_and_tell(cfg, run, wait=True)
    for callback in run.events.fit_end:
        callback.on_fit_end(progress.step, run.model)
    if not goes_on:
        run.console.say(
            f"done: {progress.stopped_by} after step {progress.step:,} and {clock(run.seconds)}; {run.info.run_dir}"
        )
