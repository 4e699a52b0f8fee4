"""What a step on several ranks costs over a hand-written DDP or FSDP2 loop with the same features, counted in Python calls."""

from __future__ import annotations

import pytest

from benchmarks.ranks import by_hand, by_sheer
from tests.ranks import run_on_ranks
from tests.test_overhead import Calls, differences

CALLS_ALLOWED = 25


def counted_on_rank(way: str) -> tuple[float, float, str]:
    """Return how many calls a step makes by hand and in Sheer, and which more."""
    ours, theirs = Calls(), Calls()
    by_sheer(ours.at_step, 150, way)  # which also makes the process group
    by_hand(theirs.at_step, 150, way)
    return theirs.per_step, ours.per_step, differences(ours, theirs)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_python_calls_a_step_over_a_hand_written_loop(way: str) -> None:
    hand, ours, which = run_on_ranks(2, counted_on_rank, way)[0]
    assert ours - hand <= CALLS_ALLOWED, f"{ours - hand:+.1f}\n{which}"
