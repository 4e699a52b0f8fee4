"""A rank that hangs is named, with the line where it is and the collective that the others wait in."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sheer.distributed.hang import Place, describe_places, explain_timeout, is_timeout, name_ranks
from sheer.distributed.recorder import recorded_collectives
from sheer.distributed.stop import StopAgreement
from sheer.distributed.world import join
from sheer.progress import Progress
from tests.ranks import run_on_ranks


def hang(folder: Path) -> None:
    rank = join(3.0).rank
    agreement = StopAgreement(Progress(step=7), rank, 3, every=0.2)
    agreement.start()
    dist.barrier()
    if rank == 1:
        time.sleep(1000)
    try:
        dist.all_reduce(torch.ones(2, 3))
    except RuntimeError as error:
        assert is_timeout(error)
        text = explain_timeout(error, agreement)  # comes back on one rank; the other ends with that one
        (folder / f"said-{rank}").write_text(text)
        agreement.failed(text)
        raise


def test_a_time_out_names_the_rank_that_hangs_and_the_collective(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank \d"):
        run_on_ranks(3, hang, tmp_path, timeout=60)
    (said,) = tmp_path.glob("said-*")
    assert said.name in ("said-0", "said-2")
    first, second, third = said.read_text().splitlines()
    assert first == "all_reduce number 2 of shape [2, 3] was not finished within 3 s."
    assert second.startswith("Rank 1 hangs: in step 7, at test_hang.py:")
    assert second.endswith("in hang; its last collective was barrier number 1.")
    assert third == "Ranks 0, 2 wait in all_reduce number 2 of shape [2, 3], in step 7."


def test_the_recorder_of_this_torch_is_read() -> None:
    assert recorded_collectives() == []  # of a process without ranks; a time-out is explained above


def test_ranks_that_are_silent_behind_or_all_waiting() -> None:
    waits = [Place(rank, 7, waits="all_reduce number 4") for rank in range(3)]
    assert describe_places([*waits, Place(3, 6, silent=30.0)]) == (
        "Rank 3 hangs: it was last heard of 30 s ago, in step 6.\nRanks 0-2 wait in all_reduce number 4, in step 7."
    )
    behind = Place(3, 6, waits="broadcast number 2", line="train.py:3 in step")
    assert describe_places([*waits, behind]).startswith(
        "Rank 3 hangs: in step 6, at train.py:3 in step; it waits in broadcast number 2."
    )
    assert "in the same collective: a device or the network hangs" in describe_places(waits)
    assert "not all in the same" in describe_places([*waits, Place(3, 7, waits="barrier number 4")])


def test_names_of_ranks() -> None:
    assert [name_ranks(ranks) for ranks in ([3], [0, 1], [5, 0, 2, 3, 4])] == ["Rank 3", "Ranks 0-1", "Ranks 0, 2-5"]
