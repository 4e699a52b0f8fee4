"""Out of a GPU's memory, which is really full: run by hand with `pytest -m gpu`."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import sheer
from tests.ranks import run_on_ranks
from tests.task import assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

MIB = 2**20
BATCH, WIDE = 1024, 65_536  # a quarter of a MiB for each sample in each of the hidden layer's values


def trained(folder: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, WIDE), nn.ReLU(), nn.Linear(WIDE, 1))
    draw = torch.Generator().manual_seed(1)
    samples = TensorDataset(torch.randn(4 * BATCH, 6, generator=draw), torch.randn(4 * BATCH, 1, generator=draw))
    sheer.Trainer(
        max_steps=16,
        device="cuda",
        run_dir=folder,
        checkpoint=False,
        loggers=[sheer.Console(live=False)],
        **settings,
    ).fit(
        net,
        lambda net, batch: F.mse_loss(net(batch[0]), batch[1]),
        DataLoader(samples, BATCH, shuffle=True),
        optimizer=lambda net: AdamW(net.parameters(), lr=1e-3, fused=True),
    )
    return net


def halved_and_small(folder: str, captured: bool) -> tuple[list[int], list[int]]:
    """Train with 720 MiB, where a whole batch needs 768 in its backward pass and half of one 384; then with micro-batches of that size.

    Returns the sizes that were said, and how many replays there were in the two runs.
    """
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(720 * MIB / whole)
    replays = [0]
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        replays[-1] += 1
        replay(graph)

    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        net = trained(f"{folder}/halved", cuda_graph=captured)
    print(said.getvalue())
    sizes = [int(n) for n in re.findall(r"out of memory at step 1: micro-batches of (\d+) instead", said.getvalue())]
    assert sizes
    replays.append(0)
    other = trained(f"{folder}/small", cuda_graph=captured, micro_batch_size=sizes[-1])
    assert_same(net.state_dict(), other.state_dict())
    return sizes, replays


@pytest.mark.parametrize("captured", [False, True])
def test_a_step_is_done_again_in_smaller_parts_as_if_they_had_been_so_from_the_start(
    captured: bool, tmp_path: Path
) -> None:
    ((sizes, replays),) = run_on_ranks(
        1, halved_and_small, str(tmp_path), captured
    )  # in a process that has nothing on the GPU yet
    assert sizes[0] == BATCH // 2
    assert replays == ([16 - 3] * 2 if captured else [0, 0])
