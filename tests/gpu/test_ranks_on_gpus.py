"""Ranks that meet through NCCL: run by hand with `pytest -m gpu`, most on a machine with two GPUs."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import sheer
import sheer.trainer
from tests.distributed import launched
from tests.gpu.test_graph import trained
from tests.ranks import run_on_ranks
from tests.task import assert_same

pytestmark = pytest.mark.gpu
one_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SCRIPT = """
import sys, time
import torch, torch.distributed as dist
from sheer.distributed.stop import StopAgreement
from sheer.distributed.world import join, world
from sheer.progress import Progress

torch.cuda.set_device(world().local_rank)
rank = join(10.0).rank
agreement = StopAgreement(Progress(step=7), rank, 2, every=0.5)
agreement.start()
values = torch.ones(8, device="cuda")
dist.all_reduce(values)
torch.cuda.synchronize()
if rank == 1:
    if sys.argv[1] == "error":
        raise ValueError("no good")
    time.sleep(1000)
dist.all_reduce(values)
torch.cuda.synchronize()
"""


@two_gpus
def test_a_time_out_of_nccl_names_the_rank_that_hangs_and_the_collective() -> None:
    began = time.monotonic()
    status, _, err = launched.run(SCRIPT, "--nproc-per-node", "2", "train.py", "hang")
    assert status == 1 and time.monotonic() - began < 90, err
    lines = err.splitlines()
    where = lines.index("all_reduce number 2 of shape [8] was not finished within 10 s.")
    assert lines[where + 1].startswith("Rank 1 hangs: in step 7, at train.py:18 in <module>;"), err
    assert lines[where + 2] == "Rank 0 waits in all_reduce number 2 of shape [8], in step 7."


@two_gpus
def test_an_error_ends_a_rank_that_waits_in_nccl() -> None:
    began = time.monotonic()
    status, _, err = launched.run(SCRIPT, "--nproc-per-node", "2", "train.py", "error")
    assert status == 1 and err.count("ValueError: no good") == 1 and "Rank 1 failed:" in err
    assert time.monotonic() - began < 60


def captured_and_not(folder: str) -> int:
    (net, _, lines, none), (other, _, own_lines, replays) = (
        trained(captured, f"{folder}/{captured}", parallel="ddp", samples=128, gradient_clip_val=1.0)
        for captured in (False, True)
    )
    assert none == 0
    assert_same(other.state_dict(), net.state_dict())
    if os.environ["RANK"] == "0":
        assert own_lines == lines
    return replays


@two_gpus
def test_ddp_is_captured_and_bit_for_bit_the_run_without_graphs(tmp_path: Path) -> None:
    assert run_on_ranks(2, captured_and_not, str(tmp_path)) == [48 - 11] * 2  # to warm up


def captured_alone(folder: str) -> int:
    """With DDP around the model also on one rank, where a run has none."""
    expanded, one = sheer.trainer.expanded, sheer.Parallel(dp_replicate=1, dp_shard=1)
    patch = pytest.MonkeyPatch()
    patch.setattr(sheer.trainer, "expanded", lambda *given: dataclasses.replace(expanded(*given), parallel=one))
    calls, forward = [], DistributedDataParallel.forward
    patch.setattr(
        DistributedDataParallel, "forward", lambda *given, **named: (calls.append(1), forward(*given, **named))[1]
    )
    try:
        replays = captured_and_not(folder)
    finally:
        patch.undo()
    assert len(calls) == 48 + 11 + 1  # without graphs in each step, with them in those before the capture and in it
    return replays


@one_gpu
def test_ddp_of_one_rank_is_captured_and_bit_for_bit_the_run_without_graphs(tmp_path: Path) -> None:
    assert run_on_ranks(1, captured_alone, str(tmp_path)) == [48 - 11]
