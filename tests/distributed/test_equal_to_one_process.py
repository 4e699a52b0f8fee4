"""Divided over ranks in any way, a run is the run of one process: losses, validations, metrics and weights."""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any

import pytest
import torch

from tests.distributed.features import LONE, TRIED, WAYS, refusal, run_feature, run_features, within
from tests.distributed.task import assert_same
from tests.ranks import run_on_ranks


@functools.cache
def on_one_process(feature: str) -> dict[str, Any]:
    os.chdir(tempfile.mkdtemp())
    return run_feature(feature)


@functools.cache
def on_ranks(way: str) -> list[dict[str, Any]]:
    os.chdir(tempfile.mkdtemp())
    ranks, parallel = (WAYS | LONE)[way]
    return run_on_ranks(
        ranks, run_features, [feature for other, feature in TRIED if other == way], parallel, timeout=300
    )


@pytest.mark.parametrize(
    ("way", "feature"), [pytest.param(*both, marks=pytest.mark.xdist_group(f"ranks: {both[0]}")) for both in TRIED]
)
def test_a_divided_run_is_the_run_of_one_process(way: str, feature: str) -> None:
    many = [result[feature] for result in on_ranks(way)]
    said = refusal(way, feature)
    if said is not None:
        assert all(isinstance(result, str) and said in result for result in many)
        return
    one = on_one_process(feature)
    for result in many:
        assert not isinstance(result, str), result
        assert_same(one, result, **within(feature))
        same = [(value, many[0]["weights"].get(name)) for name, value in result["weights"].items()]
        assert all(torch.equal(value, other) for value, other in same if other is not None)
