"""Ranks stop at the same step when any of them is told to, and end when one of them fails: without a collective."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sheer.distributed import hang, stop
from sheer.distributed.output import open_output
from sheer.distributed.recorder import Collective
from sheer.distributed.stop import StopAgreement
from sheer.distributed.world import join
from sheer.progress import Progress
from tests.ranks import run_on_ranks

EVERY = 0.1


def train(steps: int, told: dict[int, int], pause: float, together: bool) -> tuple[int, str | None, int]:
    """Train as the loop does; `told` says at which step which rank is told to stop. Returns step, reason, and looks that waited."""
    place, progress = join(30), Progress()
    agreement = StopAgreement(progress, place.rank, place.world_size, EVERY, timeout=30)
    agreement.start()
    reason, waits, wait = None, 0, agreement._wait

    def counted() -> str | None:
        nonlocal waits
        waits += 1
        return wait()

    agreement._wait = counted  # type: ignore[method-assign]
    while progress.step < steps and reason is None:
        progress.step += 1
        if told.get(place.rank) == progress.step:
            agreement.request(f"rank {place.rank} was told")
        if together:
            dist.all_reduce(torch.ones(1))
        time.sleep(pause * (place.rank + 1))
        reason = agreement.heard(None, None)
    agreement.close()
    return progress.step, reason, waits


@pytest.mark.parametrize("together", [True, False])
def test_all_ranks_stop_at_the_same_step(together: bool) -> None:
    ends = run_on_ranks(3, train, 10**9, {2: 5}, 0.001, together)
    assert len({step for step, _, _ in ends}) == 1 and ends[0][0] >= 5
    assert {reason for _, reason, _ in ends} == {"rank 2 was told"}
    assert all(1 <= waits <= 2 for _, _, waits in ends)


def test_one_reason_is_taken_where_two_ranks_are_told_differently() -> None:
    ends = run_on_ranks(2, train, 10**9, {0: 3, 1: 3}, 0.001, True)
    assert ends[0][:2] == ends[1][:2] and ends[0][1] in ("rank 0 was told", "rank 1 was told")


def test_a_request_that_comes_with_the_last_step_keeps_nobody_waiting() -> None:
    ends = run_on_ranks(2, train, 20, {1: 20}, 0.02, False)
    assert [end[:2] for end in ends] == [(20, None), (20, None)]


def test_a_step_only_compares_two_integers() -> None:
    assert StopAgreement(Progress(), 0, 2).wait_at == sys.maxsize


def fail(folder: Path, failing: int, gone: bool) -> None:
    """End as the ranks of a run do of which one fails; the parent sees who has written what."""
    place, progress = join(60), Progress(step=3)
    open_output(folder, place.rank)
    agreement = StopAgreement(progress, place.rank, place.world_size, EVERY)
    agreement.start()
    dist.barrier()
    if place.rank == failing:
        if not gone:
            agreement.failed("ValueError: no good")
        Path(folder, "failed").write_text("")
        os._exit(1)
    time.sleep(60)


@pytest.mark.parametrize(("failing", "gone"), [(1, False), (0, True)])
def test_the_other_ranks_end_by_themselves_and_note_which_failed(tmp_path: Path, failing: int, gone: bool) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match="died"):
        run_on_ranks(3, fail, tmp_path, failing, gone, timeout=50)
    assert time.monotonic() - began < 50
    said = "the store where the ranks meet is gone" if gone else "ValueError: no good"
    for rank in {1, 2} - {failing}:
        assert f"ended, because rank {failing} failed: {said}" in Path(tmp_path, f"ranks/rank-{rank}.txt").read_text()


def hang_on_device(folder: Path) -> None:
    """Stand in a step of which the device does not come back, as NCCL's collectives do not."""
    place = join(60)
    open_output(folder, place.rank)
    if place.rank == 0:
        began = time.time()
        waiting = Collective("nccl:all_reduce", 5, "default_pg", [[8]], waiting=True, began=began, timeout=1.0)
        for module in (hang, stop):
            module.recorded_collectives = lambda: [waiting]  # type: ignore[attr-defined]
    agreement = StopAgreement(Progress(step=3), place.rank, place.world_size, EVERY)
    agreement.start()
    time.sleep(60)


def test_a_rank_whose_device_waits_ends_with_the_name_of_the_one_that_hangs(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died"):
        run_on_ranks(2, hang_on_device, tmp_path, timeout=50)
    lines = Path(tmp_path, "ranks/rank-0.txt").read_text().splitlines()
    assert lines[0] == "all_reduce number 5 of shape [8] was not finished within 1 s."
    assert lines[1].startswith("Rank 1 hangs: in step 3, at test_stop.py:") and "in hang_on_device" in lines[1]
    assert lines[2] == "Rank 0 waits in all_reduce number 5 of shape [8], in step 3."
