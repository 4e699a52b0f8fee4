"""How a run goes on from a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sheer.checkpoint.bucket import FETCHED, Folder
from sheer.checkpoint.optimizer import load_optimizer_state, names_of, of_layers
from sheer.checkpoint.read import read_shared_state, read_state, stored_in
from sheer.checkpoint.store import brought, committed, read_manifest
from sheer.data.feed import TrainingData
from sheer.data.order import mix_seed
from sheer.distributed.agree import agreed, any_rank, first_of, is_other_rank
from sheer.distributed.mesh import Ranks
from sheer.due import DURATIONS, duration_over
from sheer.errors import RunError, SheerWarning, user_level
from sheer.events import Follows
from sheer.metrics import put_together
from sheer.random import random_state, seed_process, set_random_state
from sheer.run import Run
from sheer.rundir import refuse_differences
from sheer.settings import Settings
from sheer.signals import is_signal
from sheer.weights import checkpoint_at, load_model


def find_checkpoint(cfg: Settings, disk: Folder, ranks: Ranks | None) -> Path | None:
    """Return a folder with the checkpoint that `resume` means, verified by all ranks together; `disk` has the run's own. None: there is none to go on from.

    Raises:
        RunError: what there is cannot be used, or is of a run with other settings.
    """
    if cfg.resume == "auto":
        path, any_there = newest_good(disk, ranks)
        if path is None and any_there:
            raise RunError(
                f"No checkpoint in {disk} can be used; see the warnings. To start anew, give another run_dir."
            )
        return path
    if cfg.checkpoint is not None and cfg.checkpoint.directory is not None and not cfg.fast_dev_run:
        there = agreed(ranks, [] if is_other_rank(ranks) else disk.names())
        if there:
            raise RunError(
                f'{disk} already holds checkpoints: {there[-1]} is the newest. To go on from them, set resume="auto"; to start another run, '
                "give another directory."
            )
    if cfg.resume is None:
        return None
    given, name = checkpoint_at(cfg.resume, "last", disk)
    path, wrong = found_wrong(given, name, ranks)
    if wrong is not None:
        raise RunError(wrong)
    refuse_differences(path, read_manifest(path)["settings"], dataclasses.asdict(cfg))
    return path


def newest_good(disk: Folder, ranks: Ranks | None) -> tuple[Path | None, bool]:
    """Return the newest checkpoint in a folder that verifies, and whether there is any; each newer one that does not is warned of."""
    names = agreed(ranks, [] if is_other_rank(ranks) else [saved.path.name for saved in committed(disk)])
    return next(verified(disk, names, ranks), None), bool(names)


def verified(disk: Folder, names: Sequence[str], ranks: Ranks | None) -> Iterator[Path]:
    """Yield where checkpoints can be read, the last of `names` first; one in which a rank finds something wrong is warned of and passed over."""
    for name in reversed(names):
        path, wrong = found_wrong(disk, name, ranks)
        if wrong is None:
            yield path
        elif not is_other_rank(ranks):
            warnings.warn(f"{wrong} Going back to the checkpoint before it.", SheerWarning, stacklevel=user_level())


def found_wrong(disk: Folder, name: str, ranks: Ranks | None) -> tuple[Path, str | None]:
    """Return where a checkpoint can be read, and what any rank finds wrong with it, each in its share of the files; None: nothing."""
    try:
        path, wrong = brought(disk, name), None
    except RunError as error:
        path, wrong = Path(), str(error)
    return path, first_of(ranks, wrong)


def refuse_other_run(cfg: Settings, manifest: Mapping[str, Any] | None, run_id: str) -> None:
    """Raise `RunError` where a run would go on from the checkpoint of another."""
    if cfg.resume == "auto" and manifest is not None and manifest["run_id"] != run_id:
        raise RunError(
            f"The checkpoints are of the run {manifest['run_id']}, and run_dir has the run {run_id}. Give each run a directory of its own, for its "
            "checkpoints as well."
        )


def forget_copies(run: Run, checkpoint: Path | None) -> None:
    """Delete what was fetched of a checkpoint to read it, when all ranks have read it."""
    if checkpoint is not None and checkpoint.parent.name.startswith(FETCHED):
        first_of(run.ranks, None)  # waits for all
        shutil.rmtree(checkpoint.parent, ignore_errors=True)


def restore(cfg: Settings, run: Run, path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a run to where a checkpoint was made; return the states of the data and of the random numbers.

    Raises:
        RunError: the checkpoint is of another model, optimizer or scheduler, or there is nothing left to train.
    """
    weights, trained = (stored_in(path, manifest, group) for group in ("model", "training"))
    state = read_shared_state(path, manifest)
    load_model(run.model, trained or weights, state["extra"], path, has_all=not has_some_layers(run.ranks))
    refuse_other_schedulers(run, state)
    note_changes(cfg, run, manifest, state)
    run.progress.load_state_dict(state["progress"])
    for name, scheduler in (run.schedulers | run.plateaus).items():
        scheduler.load_state_dict(state["schedulers"][name])
    for name, optimizer in run.optimizers.items():  # after the schedulers, which may touch the groups
        saved = state["optimizers"][name]
        own = of_layers(saved, names_of(optimizer, run.model)) if has_some_layers(run.ranks) else saved
        load_optimizer_state(optimizer, run.model, own)
    if run.scaler is not None:
        run.scaler.load_state_dict(state["scaler"])
    for name, callback in run.callbacks.items():
        if name in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][name])
    if cfg.resume == "auto":  # this very run goes on, and so do its loggers
        run.loggers.load_state_dict(state["loggers"])
    if run.averaging is not None and trained:  # the weights that are trained; "model" has the averages then
        run.averaging.load_averages(weights)
    told = is_signal(run.progress.stopped_by) or run.progress.stopped_by in DURATIONS
    if told or cfg.resume != "auto":
        run.progress.stopped_by = duration_over(cfg, run)  # it may be longer now
    if run.progress.owes_validation:  # the step that it was stopped in is to come to its end first
        run.progress.stopped_by = None
    if cfg.resume != "auto" and run.progress.stopped_by is not None:
        raise RunError(
            f"{path} is of step {run.progress.step:,}, and {run.progress.stopped_by} is reached there: nothing would be trained. Durations "
            "count from the run's first step, earlier sessions included. Give a longer one, or take the weights alone with sheer.load_weights."
        )
    there = own_state(run.ranks, path, manifest, state)
    run.metrics.load_state_dict(there["metrics"])
    return {"data": there["data"], "random": there["random"]}


def has_some_layers(ranks: Ranks | None) -> bool:
    """Whether this rank holds some of the model's layers only."""
    return ranks is not None and ranks.parallel.pp > 1


def own_state(ranks: Ranks | None, path: Path, manifest: Mapping[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Return where the data, the random numbers and the running metrics of this rank were; `saved` has those of rank 0.

    On another number of ranks than was saved, or in another layout, the first rank whose measures count takes the metrics of all, and the
    random numbers of those that draw their own are new.

    Raises:
        RunError: the loader gave each rank its own data, and the ranks had other parts of it.
    """
    before: int = manifest["world_size"]
    there, moved = saved, before != (1 if ranks is None else ranks.world_size)
    has_other_data = moved
    if ranks is not None and not moved:
        there = saved if ranks.rank == 0 else read_state(path, manifest, ranks.rank)
        role = there.get("role", ranks.role)  # older checkpoints do not say it
        moved, has_other_data = any_rank(role != ranks.role), any_rank(role.get("data_rank") != ranks.data_rank)
    if not moved:
        return there
    if has_other_data and saved["data"] is not None and saved["data"]["kind"] in ("StatefulSource", "IterableSource"):
        raise RunError(
            f"The run was made on {before} ranks, and its loader gave each its own data: it goes on only on as many, with the same parts of "
            f"the data, not on {1 if ranks is None else ranks.world_size}."
        )
    random = saved["random"]
    if ranks is not None and ranks.stream > 0:
        seed_process(mix_seed(int(random["torch"].sum()), ranks.stream, saved["progress"]["step"]))
        random = random_state()
    metrics = {}
    if ranks is None or ranks.reports_first:
        metrics = put_together([read_state(path, manifest, r)["metrics"] for r in range(before)])
    return {"data": (saved if has_other_data else there)["data"], "random": random, "metrics": metrics}


def refuse_other_schedulers(run: Run, state: dict[str, Any]) -> None:
    """Raise `RunError` where other schedulers were saved than there are."""
    classes = {name: type(scheduler).__name__ for name, scheduler in (run.schedulers | run.plateaus).items()}
    if state["scheduler_classes"] != classes:
        raise RunError(
            f"The schedulers that were saved are {state['scheduler_classes'] or 'none'}, and these are {classes or 'none'}. Build the same, or "
            "start a new run and take the weights with sheer.load_weights."
        )


def note_changes(cfg: Settings, run: Run, manifest: Mapping[str, Any], state: dict[str, Any]) -> None:
    """Note what is not as it was when a checkpoint was made, and what comes of it: to be warned of where the run really goes on."""
    run.changes = []
    gone = [name for name in state["callbacks"] if name not in run.callbacks]
    if gone:
        run.changes.append(
            f"The checkpoint holds the state of {', '.join(gone)}, and there is no such callback now: it is dropped."
        )
    averaging = type(run.averaging).__name__
    if run.averaging is not None and averaging not in state["callbacks"] and state["progress"]["step"] > 0:
        run.changes.append(f"{averaging} was not there when the checkpoint was made: it begins to average here.")
    if None not in (state["scheduled_steps"], run.scheduled_steps) and state["scheduled_steps"] != run.scheduled_steps:
        run.changes.append(
            f"A scheduler was made for {state['scheduled_steps']} steps, and is now made for {run.scheduled_steps}: from here on it goes by the new "
            "number, so the learning rate may jump."
        )
    now, before = cfg.limit_val_batches, manifest["settings"].get("limit_val_batches", cfg.limit_val_batches)
    comparing = what_compares(cfg, run)
    if before != now and 0 not in (before, now) and state["progress"]["validated_at"] >= 0 and comparing:
        run.changes.append(
            f"limit_val_batches: {before!r} then, {now!r} now. Metrics of validations before and behind this point are of different data, and are "
            f"compared by {' and '.join(comparing)}. Put it back to compare like with like."
        )


def what_compares(cfg: Settings, run: Run) -> list[str]:
    """Return what compares the validations of a run that goes on with earlier ones."""
    keeps_best = cfg.checkpoint is not None and cfg.checkpoint.keep_best > 0 and cfg.monitor is not None
    best = ["the choice of the best checkpoint"] if keeps_best and cfg.resume == "auto" else []
    others = [*run.plateaus.values(), *(each for each in run.events.validation_end if isinstance(each, Follows))]
    return [*best, *(type(other).__name__ for other in others)]


def warn_of_changes(run: Run) -> None:
    """Warn of what is not as it was in a run that goes on."""
    for change in run.changes:
        warnings.warn(change, SheerWarning, stacklevel=user_level())


def open_data(data: TrainingData | None, state: dict[str, Any] | None) -> Callable[[], None] | None:
    """Bring the data to where it was saved. Returns what puts the random states back where the data says; None in a new run."""
    if state is None:
        return None
    if data is not None and state["data"] is not None:
        data.load_state_dict(state["data"])
    return functools.partial(set_random_state, state["random"])
