"""Python's cyclic garbage collector while a run goes: full collections happen at log points, never in the middle of a step.

A full collection looks at every object that there is: 100 ms and more once PyTorch is imported, at a moment that nobody chose. Those of
the younger generations, a fraction of a millisecond each, go on as ever.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

NEVER = 1_000_000_000  # collections of the middle generation before a full one


@dataclass
class CollectorBefore:
    """What was before the first of the runs that are open, and how many are."""

    runs: int = 0
    thresholds: tuple[int, int, int] = (0, 0, 0)
    frozen: bool = False  # whether a run froze what there was


_held = CollectorBefore()


def hold_collections() -> None:
    """Let no full collection begin by itself, until `let_collections_go` is called as often as this.

    Nothing is changed where the collector is off: then somebody else decides.
    """
    _held.runs += 1
    if _held.runs == 1:
        _held.thresholds = gc.get_threshold()
        young, middle, full = _held.thresholds
        if gc.isenabled() and young > 0 and full > 0:
            gc.set_threshold(young, middle, NEVER)


def collect_if_due() -> None:
    """Make the full collection that is due by the thresholds from before.

    Behind the first, what is left is frozen: it was looked at, and is most likely to stay, so that later ones are short.
    """
    if gc.get_threshold()[2] != NEVER or gc.get_count()[2] <= _held.thresholds[2]:
        return
    gc.collect()
    if gc.get_freeze_count() == 0:
        gc.freeze()
        _held.frozen = True


def let_collections_go() -> None:
    """Give the collector back as it was, when the last run that held it ends."""
    _held.runs -= 1
    if _held.runs > 0:
        return
    if gc.get_threshold()[2] == NEVER:
        gc.set_threshold(*_held.thresholds)
    if _held.frozen:
        gc.unfreeze()
        _held.frozen = False
