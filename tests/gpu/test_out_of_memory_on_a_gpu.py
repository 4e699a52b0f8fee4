"""Out of a GPU's memory, which is really full: run by hand with `pytest -m gpu`."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import sheer
from tests.task import assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

MIB = 2**20
BATCH, WIDE = 1024, 65_536  # a quarter of a MiB for each sample in each of the hidden layer's values


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let this process have 720 MiB: a whole batch needs 768 in its backward pass, half of one 384."""
    gc.collect()
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 720 * MIB) / whole)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def trained(folder: Path, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, WIDE), nn.ReLU(), nn.Linear(WIDE, 1))
    draw = torch.Generator().manual_seed(1)
    samples = TensorDataset(torch.randn(4 * BATCH, 6, generator=draw), torch.randn(4 * BATCH, 1, generator=draw))
    sheer.Trainer(
        max_steps=16,
        device="cuda",
        run_dir=str(folder),
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


@pytest.mark.parametrize("captured", [False, True])
def test_a_step_is_done_again_in_smaller_parts_as_if_they_had_been_so_from_the_start(
    captured: bool,
    little_memory: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))[1])
    net = trained(tmp_path / "halved", cuda_graph=captured)
    sizes = re.findall(r"out of memory at step 1: micro-batches of (\d+) instead", capsys.readouterr().out)
    assert sizes
    assert len(replays) == (16 - 3 if captured else 0)
    other = trained(tmp_path / "small", cuda_graph=captured, micro_batch_size=int(sizes[-1]))
    assert_same(net.state_dict(), other.state_dict())
