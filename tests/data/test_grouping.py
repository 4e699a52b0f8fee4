"""Batches of alike lengths: every sample once, little padding, one order for each seed and epoch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sheer
from sheer.data import LengthGroupedBatches

LENGTHS = (np.random.default_rng(0).lognormal(4.5, 0.8, 3000).astype(int) + 1).tolist()


def padding(batches: list[list[int]]) -> float:
    padded = sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in batches)
    return 1 - sum(LENGTHS) / padded


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    batch_size=st.integers(1, 9) | st.none(),
    more=st.integers(0, 500),
    epoch=st.integers(0, 3),
)
def test_every_sample_is_in_one_batch(lengths: list[int], batch_size: int | None, more: int, epoch: int) -> None:
    most = None if batch_size is not None else max(lengths) + more
    batches = LengthGroupedBatches(lengths, batch_size, most)
    batches.set_epoch(epoch)
    drawn = list(batches)
    assert len(drawn) == len(batches)  # in each epoch
    assert sorted(itertools.chain(*drawn)) == list(range(len(lengths)))
    if most is not None:
        assert max(len(batch) * max(lengths[index] for index in batch) for batch in drawn) <= most
    else:
        assert sum(len(batch) != batch_size for batch in drawn) <= 1 and max(map(len, drawn)) <= (batch_size or 0)


@pytest.mark.parametrize("size", [{"batch_size": 32}, {"max_tokens": 8192}], ids=str)
def test_little_is_padded(size: dict[str, int]) -> None:
    at_random = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(0)).tolist()
    assert padding([at_random[start : start + 32] for start in range(0, len(LENGTHS), 32)]) > 0.6
    assert padding(list(LengthGroupedBatches(LENGTHS, **size))) < 0.1


def test_the_order_is_that_of_seed_and_epoch() -> None:
    first, again, other = (LengthGroupedBatches(LENGTHS, 16, seed=seed) for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other)
    for batches in (first, again):
        batches.set_epoch(1)
    later = list(first)
    assert later == list(again)
    first.set_epoch(0)
    assert later != list(first)
    assert {frozenset(batch) for batch in later}.isdisjoint(map(frozenset, first))  # not the batches alone are shuffled
    longest = [max(LENGTHS[index] for index in batch) for batch in later]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"lengths": [3]}, "either batch_size or max_tokens"),
        ({"lengths": [3], "batch_size": 2, "max_tokens": 9}, "either batch_size or max_tokens"),
        ({"lengths": [], "batch_size": 2}, "at least one sample"),
        ({"lengths": [3, 0], "batch_size": 2}, "at least 1"),
        ({"lengths": [3, 12], "max_tokens": 9}, "Sample 1 has a length of 12"),
        ({"lengths": [3], "batch_size": 2, "tolerance": 0.0}, "tolerance above 0"),
    ],
)
def test_what_cannot_be_grouped_is_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(sheer.DataError, match=said):
        LengthGroupedBatches(**arguments)
