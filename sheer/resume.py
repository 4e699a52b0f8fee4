"""How a run goes on from a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sheer.checkpoint.codec import decode
from sheer.checkpoint.optimizer import load_optimizer_state
from sheer.checkpoint.store import committed, read_tensors, read_text, verify
from sheer.data.feed import TrainingData
from sheer.due import DURATIONS, duration_over
from sheer.errors import RunError, SheerWarning
from sheer.random import set_random_state
from sheer.run import Run
from sheer.rundir import refuse_differences
from sheer.settings import Settings
from sheer.signals import is_signal
from sheer.weights import checkpoint_in, load_model


def find_checkpoint(cfg: Settings, directory: Path) -> Path | None:
    """Return the checkpoint that `resume` means, verified; `directory` is that of the run's own. None: there is none to go on from.

    Raises:
        RunError: what there is cannot be used, or is of a run with other settings.
    """
    if cfg.resume is None:
        return None
    if cfg.resume == "auto":
        path = newest_good(directory)
        if path is None and committed(directory):
            raise RunError(
                f"No checkpoint in {directory} can be used; see the warnings. To start anew, give another run_dir."
            )
        return path
    path = checkpoint_in(cfg.resume)
    refuse_differences(path, verify(path).get("settings", {}), dataclasses.asdict(cfg))
    return path


def restore(cfg: Settings, run: Run, path: Path) -> dict[str, Any]:
    """Bring a run to where a checkpoint was made; return the states of the data and of the random numbers, for `open_data`.

    Raises:
        RunError: the checkpoint is of another model, optimizer or scheduler, or there is nothing left to train.
    """
    tensors, weights, trained = (read_tensors(path, name) for name in ("state", "model", "training"))
    state: dict[str, Any] = decode(read_text(path, "state"), tensors)
    extra = decode(read_text(path, "extra"), tensors)  # what a model's `get_extra_state` adds
    load_model(run.model, {**(trained or weights), **extra}, path)
    refuse_other_schedulers(run, state)
    warn_of_changes(run, state)
    run.progress.load_state_dict(state["progress"])
    for name, scheduler in (run.schedulers | run.plateaus).items():
        scheduler.load_state_dict(state["schedulers"][name])
    for name, optimizer in run.optimizers.items():  # after the schedulers, which may touch the groups
        load_optimizer_state(optimizer, run.model, state["optimizers"][name])
    if run.scaler is not None:
        run.scaler.load_state_dict(state["scaler"])
    run.metrics.load_state_dict(state["metrics"])
    for name, callback in run.callbacks.items():
        if name in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][name])
    if cfg.resume == "auto":  # this very run goes on, and so do its loggers
        run.loggers.load_state_dict(state["loggers"])
    if run.averaging is not None and trained:  # the weights that are trained; "model" has the averages then
        run.averaging.load_averages(weights)
    told = is_signal(run.progress.stopped_by) or run.progress.stopped_by in DURATIONS
    if told or cfg.resume != "auto":
        run.progress.stopped_by = duration_over(cfg, run)  # it may be longer now, or that of another run
    if cfg.resume != "auto" and run.progress.stopped_by is not None:
        raise RunError(
            f"{path} is of step {run.progress.step:,}, and {run.progress.stopped_by} is reached there: nothing would be trained. Durations "
            "count from the run's first step, earlier sessions included. Give a longer one, or take the weights alone with sheer.load_weights."
        )
    return {"data": state["data"], "random": state["random"]}


def refuse_other_schedulers(run: Run, state: dict[str, Any]) -> None:
    """Raise `RunError` where other schedulers were saved than there are."""
    classes = {name: type(scheduler).__name__ for name, scheduler in (run.schedulers | run.plateaus).items()}
    if state["scheduler_classes"] != classes:
        raise RunError(
            f"The schedulers that were saved are {state['scheduler_classes'] or 'none'}, and these are {classes or 'none'}. Build the same, or "
            "start a new run and take the weights with sheer.load_weights."
        )


def warn_of_changes(run: Run, state: dict[str, Any]) -> None:
    """Warn of what may change when a run goes on, and changes what comes of it."""
    said = []
    gone = [name for name in state["callbacks"] if name not in run.callbacks]
    if gone:
        said.append(
            f"The checkpoint holds the state of {', '.join(gone)}, and there is no such callback now: it is dropped."
        )
    averaging = type(run.averaging).__name__
    if run.averaging is not None and averaging not in state["callbacks"] and state["progress"]["step"] > 0:
        said.append(f"{averaging} was not there when the checkpoint was made: it begins to average here.")
    if None not in (state["scheduled_steps"], run.scheduled_steps) and state["scheduled_steps"] != run.scheduled_steps:
        said.append(
            f"A scheduler was made for {state['scheduled_steps']} steps, and is now made for {run.scheduled_steps}: from here on it goes by the new "
            "number, so the learning rate may jump."
        )
    for warning in said:
        warnings.warn(warning, SheerWarning, stacklevel=5)


def open_data(data: TrainingData | None, state: dict[str, Any] | None) -> Callable[[], None] | None:
    """Bring the data to where it was saved. Returns what puts the random states back where the data says; None in a new run."""
    if state is None:
        return None
    if data is not None and state["data"] is not None:
        data.load_state_dict(state["data"])
    return functools.partial(set_random_state, state["random"])


def newest_good(directory: Path) -> Path | None:
    """Return the newest checkpoint in a folder that verifies; each newer one that does not is warned of."""
    for saved in reversed(committed(directory)):
        try:
            verify(saved.path)
        except RunError as error:
            warnings.warn(f"{error} Going back to the checkpoint before it.", SheerWarning, stacklevel=2)
        else:
            return saved.path
    return None
