"""Going back from a NaN or a spike: the run is, bit for bit, one that never saw the batches that did it."""

from __future__ import annotations

from typing import Any

import pytest

import sheer
from tests.faults.runs import same
from tests.rollback import BATCHES, Step, lines_of, plain, progress_of, run


def assert_equals_plain(
    bad: list[tuple[int, int]], by_hand: dict[str, Any] | None = None, **how: Any
) -> dict[str, Any]:
    """Train with these bad batches, and compare with a loop written by hand that leaves them out."""
    left = run("run", Step(bad, **how.pop("step", {})), **how)
    same(left, plain(bad, **(by_hand or {})))
    steps = [line["step"] for line in left["lines"]]
    assert steps == sorted(set(steps))
    return left


PLACES = {
    "the first batch of all": [(0, 0)],
    "the second": [(0, 1)],
    "in the middle of an epoch": [(1, 3)],
    "the first of an epoch": [(1, 0)],
    "the last of an epoch": [(1, 6)],
    "the last of all": [(2, 6)],
    "the one after a save": [(1, 5)],
    "two that are far from each other": [(0, 2), (2, 1)],
    "two side by side": [(1, 2), (1, 3)],
    "the end of an epoch and the start of the next": [(0, 6), (1, 0)],
    "the last two of an epoch": [(1, 5), (1, 6)],
}


@pytest.mark.parametrize("where", PLACES)
def test_a_nan_in(where: str) -> None:
    assert_equals_plain(PLACES[where])
    assert progress_of("run")["rollbacks"] == len(PLACES[where])
