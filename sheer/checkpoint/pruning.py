"""Which checkpoints of a run that is over are to go, and their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sheer.checkpoint.bucket import Folder
from sheer.checkpoint.saver import is_rest
from sheer.checkpoint.store import MANIFEST, Retention, Saved, brought, point_links, staying_of
from sheer.errors import RunError


@dataclass(frozen=True)
class Pruning:
    """What becomes of the checkpoints of a run."""

    staying: Sequence[Saved]  # oldest first
    going: Sequence[str]
    rests: Sequence[str]  # of saves that were cut off; they go, too
    damaged: Sequence[str]  # they count for nothing, and stay where they are


def only_run_of(disk: Folder, saves: Sequence[Saved]) -> str:
    """Return the run whose checkpoints a folder has.

    Raises:
        RunError: there is none, or there are several.
    """
    found = sorted({str(saved.manifest["run_id"]) for saved in saves})
    if len(found) != 1:
        said = f"checkpoints of the runs {', '.join(found)}, and no run.json says which is meant" if found else "none"
        raise RunError(f"{disk} holds {said}. Give a run's directory.")
    return found[0]


def refuse_unknown_ranking(disk: Folder, saves: Sequence[Saved], monitor: str | None, mode: str | None) -> None:
    """Raise `RunError` where a metric is to say which checkpoints are best and none of them has it, or the mode is none: the best would go."""
    if mode not in (None, "min", "max"):
        raise RunError(f'--mode is "min" or "max", not {mode!r}: nothing is deleted.')
    if monitor is None or any(monitor in saved.metrics for saved in saves):
        return
    there = sorted({name for saved in saves for name in saved.metrics})
    raise RunError(
        f"No checkpoint in {disk} has a metric {monitor!r}, so none would be the best: nothing is deleted. "
        + (f"There are {', '.join(there)}." if there else "They have no metrics; leave --monitor out.")
    )


def plan_pruning(disk: Folder, run_id: str, saves: Sequence[Saved], keep: Retention) -> Pruning:
    """Decide which of a run's checkpoints stay; those that do are verified first, so that no damaged one takes the place of a good one."""
    own = list(saves)
    damaged: list[str] = []
    while True:
        staying = staying_of(own, keep)
        wrong = [saved for saved in staying if is_damaged(disk, saved.path.name)]
        if not wrong:
            break
        damaged += [saved.path.name for saved in wrong]
        own = [saved for saved in own if saved not in wrong]
    kept_names = {saved.path.name for saved in staying}
    rests = [name for name in disk.names() if disk.read(name, MANIFEST) is None and is_rest(disk, name, run_id)]
    return Pruning(staying, [s.path.name for s in own if s.path.name not in kept_names], rests, sorted(damaged))


def is_damaged(disk: Folder, name: str) -> bool:
    """Whether the files of a checkpoint are not as they were written."""
    try:
        brought(disk, name)
    except RunError:
        return True
    finally:
        disk.forget()
    return False


def carry_out(disk: Folder, pruning: Pruning, keep: Retention) -> None:
    """Delete what is to go; `last` and `best` point at what stays, before anything goes."""
    point_links(disk, pruning.staying, keep)
    for link in ("last", "best"):
        if disk.pointed(link) in pruning.going:
            disk.unpoint(link)
    for name in [*pruning.rests, *pruning.going]:
        disk.remove(name, MANIFEST)
