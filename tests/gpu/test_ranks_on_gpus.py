"""Ranks that meet through NCCL: run by hand with `pytest -m gpu`, on a machine with two GPUs."""

from __future__ import annotations

import time

import pytest
import torch

from tests.distributed import launched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

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


def test_a_time_out_of_nccl_names_the_rank_that_hangs_and_the_collective() -> None:
    began = time.monotonic()
    status, _, err = launched.run(SCRIPT, "--nproc-per-node", "2", "train.py", "hang")
    assert status == 1 and time.monotonic() - began < 90, err
    lines = err.splitlines()
    where = lines.index("all_reduce number 2 of shape [8] was not finished within 10 s.")
    assert lines[where + 1].startswith("Rank 1 hangs: in step 7, at train.py:18 in <module>;"), err
    assert lines[where + 2] == "Rank 0 waits in all_reduce number 2 of shape [8], in step 7."


def test_an_error_ends_a_rank_that_waits_in_nccl() -> None:
    began = time.monotonic()
    status, _, err = launched.run(SCRIPT, "--nproc-per-node", "2", "train.py", "error")
    assert status == 1 and err.count("ValueError: no good") == 1 and "Rank 1 failed:" in err
    assert time.monotonic() - began < 60
