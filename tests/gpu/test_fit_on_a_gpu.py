"""What only a GPU can show: run by hand with `pytest -m gpu`."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import sheer
from sheer.data.batch import StepBatch
from sheer.data.feed import copied_ahead
from tests.task import assert_same, dataset, loader, loss_step, model, plain_loader, step
from tests.task import trainer as trainer_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def trainer(**settings: Any) -> sheer.Trainer:
    return trainer_of(device="cuda", **settings)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mixed", [False, True])
def test_fit_equals_the_hand_written_loop(workers: int, mixed: bool) -> None:
    net = model().cuda()
    optimizer = optimizer_of(net)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
                loss = loss_step(net, tuple(part.cuda() for part in batch))
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()

    other = model()
    torch.manual_seed(0)
    trainer(precision="bf16-mixed" if mixed else "32-true", gradient_clip_val=0.5).fit(
        other, step, loader(num_workers=workers), optimizer=lambda m: optimizer_of(m)
    )
    assert next(other.parameters()).is_cuda
    assert_same(other.state_dict(), net.state_dict())


def test_16_mixed_trains() -> None:
    net = model()
    result = trainer(precision="16-mixed", max_epochs=5, gradient_clip_val=1.0).fit(
        net, step, loader(), loader(50), optimizer=lambda m: optimizer_of(m)
    )
    assert result.metrics["val/loss"] < 6


class Watching:
    """Lets any wait for the device be an error between two steps."""

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        if step == 5:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, step: int, model: nn.Module) -> None:
        if step == 40:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_waits_for_the_device_between_log_points(workers: int) -> None:
    net = model()
    try:
        trainer(
            max_steps=50,
            log_every_n_steps=50,
            precision="bf16-mixed",
            gradient_clip_val=1.0,
            checkpoint=True,
            callbacks=[Watching(), sheer.EMA(), sheer.LearningRateMonitor(), sheer.Throughput(), sheer.GradientNorm()],
        ).fit(
            net,
            step,
            loader(num_workers=workers, samples=1000),
            optimizer=lambda m: optimizer_of(m),
            scheduler=sheer.warmup_cosine(5),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_mean_over_micro_batches_waits_for_nothing() -> None:
    def masked(net: nn.Module, batch: Any) -> sheer.Mean:
        return sheer.mean((net(batch[0]) - batch[1]) ** 2, mask=batch[1] > 0)

    net = model()
    try:
        trainer(max_steps=50, log_every_n_steps=50, micro_batch_size=4, callbacks=[Watching()]).fit(
            net, masked, loader(samples=1000), optimizer=lambda m: optimizer_of(m)
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_resumes_exactly(tmp_path: Path) -> None:
    def train(folder: str, steps: int) -> dict[str, Any]:
        sheer.seed_everything(0)
        net = model()
        trainer(max_steps=steps, run_dir=folder, resume="auto", checkpoint=True, precision="bf16-mixed").fit(
            net, step, loader(), optimizer=lambda m: optimizer_of(m)
        )
        return copy.deepcopy(net.state_dict())

    whole = train("whole", 20)
    train("stopped", 11)
    assert_same(train("stopped", 20), whole)


def test_batches_that_are_copied_ahead_are_whole() -> None:
    """Each copy is used while the next is on its way; memory that is given back is not overwritten too early."""
    device = torch.device("cuda")
    sources = [torch.full((1 << 20,), float(number)) for number in range(50)]
    sums = []
    for batch in copied_ahead(iter([StepBatch([(source, 1)]) for source in sources]), device, None):
        ((values, _),) = batch
        for _ in range(20):
            values = values * 1.0
        sums.append(values.mean())
        del values
    assert [value.item() for value in sums] == [float(number) for number in range(50)]


def test_rebuilt_loaders_pin_their_memory() -> None:
    from sheer.data.source import GlobalOrderSource

    source = GlobalOrderSource(DataLoader(dataset(), batch_size=4), seed=0, device=torch.device("cuda"))
    assert source.loader.pin_memory


def captured_by_hand(net: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any]) -> None:
    """Three steps, then one that is captured and replayed."""
    a, b = (part.cuda() for part in batches[0])

    def once() -> None:
        F.mse_loss(net(a), b).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    for batch in batches[3:]:
        for place, part in zip((a, b), batch, strict=True):
            place.copy_(part)
        graph.replay()


@pytest.mark.parametrize("way", ["eager", "compiled", "captured"])
def test_memory_is_that_of_the_hand_written_loop(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))[1])

    def net_of() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(512, 4096), nn.ReLU(), nn.Linear(4096, 512))

    x = torch.randn(4096, 512)
    batches = [(x, x)] * 6

    def peak(train: Any) -> int:
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train()
        return torch.cuda.max_memory_allocated() - before

    def plain() -> None:
        net = net_of().cuda()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True, capturable=way == "captured")
        step = torch.compile(loss_step) if way == "compiled" else loss_step
        for a, b in batches if way != "captured" else []:
            step(net, (a.cuda(), b.cuda())).backward()
            optimizer.step()
            optimizer.zero_grad()
        if way == "captured":
            captured_by_hand(net, optimizer, batches)

    def ours() -> None:
        replays.clear()
        trainer(max_steps=6, compile=way == "compiled", cuda_graph=way == "captured").fit(
            net_of(), loss_step, batches, optimizer=lambda m: optimizer_of(m)
        )
        assert len(replays) == (3 if way == "captured" else 0)

    plain(), ours()  # what libraries take once, they have
    one_batch = 2 * x.numel() * 4  # the next one, on its way
    of_graph = (
        one_batch + 2**19 if way == "captured" else 0
    )  # a batch is copied to where the graph reads; a table of losses
    by_hand, by_fit = peak(plain), peak(ours)
    print(f"{way}: {by_hand / 2**20:.2f} MiB by hand, {by_fit / 2**20:.2f} by fit, {one_batch / 2**20:.2f} a batch")
    assert by_fit <= 1.001 * by_hand + one_batch + of_graph
