"""Going back from a NaN or a spike: the run is, bit for bit, one that never saw the batches that did it."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sheer
from sheer.errors import BadStepsError
from sheer.nonfinite import Watch
from sheer.trail import FEWEST, Trail, Trained, limit_of, on_host
from tests.faults.runs import same
from tests.rollback import BATCHES, Step, plain, progress_of, run
from tests.task import loader

pytestmark = pytest.mark.usefixtures("in_memory")


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


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_nan_that_only_the_gradient_shows_is_put_down_to_its_own_batch(clip: float | None) -> None:
    left = assert_equals_plain([(1, 2)], {"clip": clip}, step={"through": "gradient"}, gradient_clip_val=clip)
    assert left["step"] == 20 and progress_of("run")["rollbacks"] == 1


def test_an_infinity() -> None:
    assert_equals_plain([(1, 2)], step={"factor": float("inf")})


def test_a_spike() -> None:
    assert_equals_plain([(1, 5)], step={"factor": 1e3}, rollback=sheer.Rollback(spike=20.0))
    progress = progress_of("run")
    assert progress["rollbacks"] == 1 and progress["left_out"] == [[1, 5, 5]] and len(progress["losses"]) == 20


def test_spikes_side_by_side_are_left_out_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    bad = [(1, 5), (1, 6), (2, 0)]
    how = {
        "rollback": sheer.Rollback(max_times=1, spike=20.0),
        "log_every_n_steps": 9,
        "checkpoint": sheer.Checkpoint(),
    }
    assert_equals_plain(bad, {"every": 9}, step={"factor": 1e3}, **how)
    said = capsys.readouterr().out
    assert "back to step 0, and on without batches 5 to 6 of epoch 1 and batch 0 of epoch 2 (counted from 0)" in said


def test_a_spike_is_left_alone_where_none_is_looked_for() -> None:
    assert run("run", Step([(1, 5)], factor=1e3))["step"] == 21


def test_a_nan_behind_a_spike_is_not_taken_for_another_bad_batch() -> None:
    """The spike is found first, and what its update has led to says nothing of the batches behind it."""

    def breaks(net: nn.Module, batch: Any, step: int) -> dict[str, Tensor]:
        loss = spiking(net, batch, step)["loss"]
        leads_to_nan = step == 14 and spiking.seen == [13] and not broken
        broken.extend([step] if leads_to_nan else [])
        return {"loss": loss * (float("nan") if leads_to_nan else 1.0)}

    spiking, broken = Step([(1, 5)], factor=1e3), list[int]()
    same(run("run", breaks, rollback=sheer.Rollback(spike=20.0), log_every_n_steps=7), plain([(1, 5)], every=7))
    assert broken == [14]


def test_what_counts_as_a_spike() -> None:
    positive = [1.0, 2.0, 3.0] * 5
    assert limit_of(positive[: FEWEST - 1], 3.0) == math.inf
    assert limit_of(positive, 3.0) == 6.0
    assert limit_of([loss - 3.0 for loss in positive], 3.0) == 1.0  # m = -1, d = 1
    assert limit_of([-1.0, 0.0, 1.0] * 5, 3.0) == 2.0  # m = 0, d = 1
    assert limit_of([0.0] * 20, 3.0) == math.inf


@given(st.lists(st.floats(0.0, 1e6), min_size=FEWEST, max_size=50), st.floats(1.01, 100.0))
@settings(max_examples=50, deadline=None)
def test_where_no_loss_is_below_0_the_limit_is_a_multiple_of_the_median(losses: list[float], spike: float) -> None:
    middle = median(losses)
    assert limit_of(losses, spike) == (pytest.approx(spike * middle) if middle > 0 else math.inf)


def test_an_infinite_loss_is_no_spike_and_what_follows_is_not_bad_with_it() -> None:
    trail, watch = Trail(2.0), Watch()
    for step, loss in enumerate([*[1.0] * 20, math.inf, 9.0], start=1):
        watch.add(step, "loss", torch.tensor(loss))
        trail.add(step, Trained(0, step, step, False), ([torch.tensor(loss)], [1], True))
    with pytest.raises(BadStepsError, match="became NaN or infinite at step 21") as found:
        trail.check(watch, None, [])
    assert (found.value.first, found.value.last) == (21, 21)


def test_a_rise_that_is_slow_is_no_spike() -> None:
    trail, before = Trail(2.0), list[float]()
    for step in range(1, 200):
        trail.add(step, Trained(0, step, step, False), ([torch.tensor(1.02**step)], [1], True))
        if step % 20 == 0:
            trail.check(Watch(), None, before)
    assert len(before) == 50


def test_nothing_is_read_between_log_points_and_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    read, now = list[int](), [0]
    monkeypatch.setattr("sheer.trail.on_host", lambda numbers: read.append(now[0]) or on_host(numbers))
    steps = sheer.On(step_start=lambda step, model, batch: now.__setitem__(0, step))
    how = {"rollback": sheer.Rollback(spike=20.0), "callbacks": lambda: [steps], "log_every_n_steps": 7}
    run("run", Step([]), checkpoint=sheer.Checkpoint(every_n_steps=10), **how)
    assert set(read) == {0, 7, 10, 14, 20, 21}


def test_after_so_many_times_the_error_comes_through_and_more_can_be_allowed() -> None:
    bad = [(0, 5), (1, 2), (2, 2)]
    with pytest.raises(
        sheer.NonFiniteError, match=r"became NaN or infinite at step 15.*went back 2 times before, and may not again"
    ):
        run("run", Step(bad), rollback=sheer.Rollback(max_times=2))
    with pytest.raises(sheer.NonFiniteError, match="went back 2 times before"):
        run("run", Step(bad), rollback=sheer.Rollback(max_times=2))
    same(run("run", Step(bad), rollback=sheer.Rollback(max_times=3)), plain(bad))


def test_a_run_that_ended_by_a_nan_goes_on_with_it() -> None:
    with pytest.raises(sheer.NonFiniteError):
        run("run", Step([(1, 2)]), rollback="raise")
    same(run("run", Step([(1, 2)])), plain([(1, 2)]))


@pytest.mark.parametrize("number", [2, 3, 6])
def test_accumulation_leaves_out_the_batches_of_the_step(number: int) -> None:
    first = number - number % 2
    left = run("run", Step([(1, number)]), accumulate_grad_batches=2)
    same(left, plain([(1, first)], accumulate=2))
    assert progress_of("run")["left_out"] == [[1, first, min(first + 1, BATCHES - 1)]]


def test_averages_and_bf16() -> None:
    how = {"callbacks": lambda: [sheer.EMA(0.9)], "precision": "bf16-mixed"}
    assert_equals_plain([(0, 2), (1, 3)], {"decay": 0.9, "bf16": True}, **how)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
@pytest.mark.parametrize("bad", [[(0, 2)], [(1, 6)]])
def test_workers(options: dict[str, Any], bad: list[tuple[int, int]]) -> None:
    options = {"multiprocessing_context": "fork", **options}
    assert_equals_plain(bad, {"options": options}, data=lambda: loader(**options))
