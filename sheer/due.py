"""What is due after a step, by the settings and the counters: a validation, a save, the end."""

from __future__ import annotations

from sheer.run import Run
from sheer.saving import is_among_best
from sheer.settings import Settings

DURATIONS = ("max_steps", "max_epochs", "max_time")


def duration_over(cfg: Settings, run: Run) -> str | None:
    """Return which of the run's durations is over, or None."""
    if cfg.max_epochs is not None and run.progress.epoch >= cfg.max_epochs:
        return "max_epochs"
    if cfg.max_steps is not None and run.progress.step >= cfg.max_steps:
        return "max_steps"
    if cfg.max_time is not None and run.seconds >= cfg.max_time:
        return asked_for(run, "max_time")
    return None


def asked_for(run: Run, reason: str | None) -> str | None:
    """Return why one rank wants to stop; of several it only asks the others, and all stop some steps later."""
    if run.agreement is None or reason is None:
        return reason
    run.agreement.request(reason)
    return None


def validation_is_due(cfg: Settings, step: int, at_end: bool) -> bool:
    """Whether a validation comes after this step: every n steps, or at the end of each epoch."""
    return at_end if cfg.validate_every_n_steps is None else step % cfg.validate_every_n_steps == 0


def save_is_due(cfg: Settings, run: Run, at_end: bool) -> bool:
    """Whether a checkpoint comes after this step: every n steps or epochs, or because it is among the best."""
    if cfg.checkpoint is None:
        return False
    if cfg.checkpoint.every_n_steps is not None and run.progress.step % cfg.checkpoint.every_n_steps == 0:
        return True
    if cfg.checkpoint.every_n_epochs is not None and at_end and run.progress.epoch % cfg.checkpoint.every_n_epochs == 0:
        return True
    return run.progress.validated_at == run.progress.step and is_among_best(cfg, run)
