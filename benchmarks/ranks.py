"""What a step on several ranks costs the host beyond PyTorch itself: hand-written DDP and FSDP2 loops, and Sheer.

    python benchmarks/ranks.py               # about two minutes on two cores
    python benchmarks/ranks.py --blocks 100

Calls are those of Python functions, a step, on one of two ranks. Times are of one process that is a group by itself: its steps go the way of
several ranks, and wait for no other (one rank has nothing to shard, so there `parallelize` calls `fully_shard`). The loops take turns in blocks of ten steps, and the lower quartiles of the blocks are compared, once of
the even blocks and once of the odd ones: where these differ by more than 10 µs, only the calls count.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sheer
from benchmarks.overhead import BLOCK, Arm, quartile, quiet_console
from sheer.data import GlobalSampler

Tick = Callable[[], None]
WAYS = {
    "ddp": ("DDP", sheer.Parallel(dp_replicate=-1, dp_shard=1)),
    "fsdp": ("FSDP2, two modules and the root", sheer.Parallel()),
}
BATCH = 32  # samples of a step, on all ranks together


def data() -> TensorDataset:
    return TensorDataset(torch.randn(3200, 16), torch.randint(0, 4, (3200,)))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)


def sharded(net: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in net.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(net)


def by_hand(tick: Tick, steps: int, way: str) -> None:
    """The loop that a careful person writes: each rank's part of the global order, a mean of the loss that waits for nothing."""
    net = network()
    module: nn.Module = net
    if way == "ddp":
        module = nn.parallel.DistributedDataParallel(net)
    else:
        sharded(net, None)
    optimizer = adamw(net)
    samples, ranks = data(), dist.get_world_size()
    sampler = GlobalSampler(samples, seed=0, batch_size=BATCH, rank=dist.get_rank(), world_size=ranks)
    losses = []
    for epoch in range(steps * BATCH // len(samples) + 1):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(samples, batch_size=BATCH // ranks, sampler=sampler):
            tick()
            loss = F.cross_entropy(module(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append((loss.detach(), len(x)))


def by_sheer(tick: Tick, steps: int, way: str) -> None:
    """The same, with nothing logged in these steps."""

    def step(net: nn.Module, batch: Any) -> torch.Tensor:
        tick()
        x, y = batch
        return F.cross_entropy(net(x), y)

    trainer = sheer.Trainer(
        max_steps=steps, log_every_n_steps=10 * steps, run_dir=tempfile.mkdtemp(), loggers=[quiet_console()]
    )
    trainer.settings = dataclasses.replace(trainer.settings, parallel=WAYS[way][1])  # on one rank too
    net = network()
    trainer.fit(
        net,
        step,
        DataLoader(data(), batch_size=BATCH, shuffle=True),
        optimizer=adamw,
        parallelize=sharded if way == "fsdp" and trainer.world_size == 1 else None,
    )


def measured(way: str, blocks: int) -> tuple[Arm, Arm]:
    """Return the two loops after they have taken turns in this process."""
    arms = [
        Arm(name, functools.partial(train, way=way), (blocks + 30) * BLOCK)
        for name, train in (("by hand", by_hand), ("Sheer", by_sheer))
    ]
    for arm in arms:
        arm.start()
        for _ in range(10):
            arm.block()
        arm.times.clear()
    for number in range(blocks):
        for arm in arms if number % 4 < 2 else reversed(arms):  # each half of the blocks has both orders
            arm.block()
    return arms[0], arms[1]


def rows(calls: dict[str, tuple[float, float]], blocks: int) -> list[str]:
    lines = [
        "| | Python calls a step, by hand | Sheer | µs a step, by hand | Sheer |",
        "| --- | --- | --- | --- | --- |",
    ]
    for way, (name, _) in WAYS.items():
        hand, ours = measured(way, blocks)
        halves = [quartile(ours.times[half::2]) - quartile(hand.times[half::2]) for half in (0, 1)]
        more = quartile(ours.times) - quartile(hand.times)
        by_hand_calls, our_calls = calls[way]
        lines.append(
            f"| {name} | {by_hand_calls:.0f} | {our_calls - by_hand_calls:+.0f} | {quartile(hand.times):.0f} | "
            f"{more:+.0f} ({halves[0]:+.0f}, {halves[1]:+.0f}) |"
        )
    return lines


def main() -> None:
    from tests.distributed.test_overhead_on_ranks import counted_on_rank
    from tests.ranks import run_on_ranks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=500)
    blocks = parser.parse_args().blocks
    torch.set_num_threads(1)
    print(
        f"{time.strftime('%Y-%m-%d')}; Python {platform.python_version()}, torch {torch.__version__}, gloo; {os.cpu_count()} cores, one thread\n"
    )
    counts = {way: run_on_ranks(2, counted_on_rank, way)[0] for way in WAYS}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("\n".join(rows({way: (hand, ours) for way, (hand, ours, _) in counts.items()}, blocks)))
    sys.stdout.flush()
    os._exit(0)  # the loops are still in the middle of their training


if __name__ == "__main__":
    main()
