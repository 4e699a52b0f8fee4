"""What a step costs over a hand-written loop with the same features, counted: Python calls, host syncs, frames, imports."""

from __future__ import annotations

import io
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

import sheer
from sheer.data import GlobalSampler
from tests.task import trainer

STEPS = 40
CALLS_ALLOWED = 20


class Calls:
    """Counts the Python functions that are called between the starts of two steps, `STEPS` apart."""

    def __init__(self) -> None:
        self.step, self.seen = 0, Counter[str]()

    def count(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self.seen[f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_code.co_qualname}"] += 1

    def at_step(self) -> None:
        self.step += 1
        if self.step == 60:
            sys.setprofile(self.count)
        elif self.step == 60 + STEPS:
            sys.setprofile(None)

    @property
    def per_step(self) -> float:
        return sum(self.seen.values()) / STEPS


def data() -> TensorDataset:
    return TensorDataset(torch.randn(3200, 16), torch.randint(0, 4, (3200,)))


def network() -> tuple[nn.Module, AdamW]:
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return net, AdamW(net.parameters(), lr=1e-3, fused=True)


def counted_step(calls: Calls) -> Any:
    def step(net: nn.Module, batch: Any) -> Any:
        calls.at_step()
        x, y = batch
        return F.cross_entropy(net(x), y)

    return step


def hand_written(calls: Calls) -> None:
    """The loop with what Sheer does by default: the global order, a mean of the loss that waits for nothing."""
    net, optimizer = network()
    step, samples = counted_step(calls), data()
    sampler = GlobalSampler(samples, seed=0)
    losses = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in DataLoader(samples, batch_size=32, sampler=sampler):
            loss = step(net, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append((loss.detach(), len(batch[0])))


def hand_written_with_everything(calls: Calls) -> None:
    """The loop with autocast, clipping, a schedule, EMA, a transfer, and losses kept for a log."""
    net, optimizer = network()
    scheduler = OneCycleLR(optimizer, max_lr=1e-3, total_steps=200)
    step, samples = counted_step(calls), data()
    parameters = list(net.parameters())
    averages = [parameter.detach().clone() for parameter in parameters]
    average = get_ema_multi_avg_fn(0.999)
    sampler = GlobalSampler(samples, seed=0)
    losses, norms = [], []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(samples, batch_size=32, sampler=sampler):
            x, y = x.to("cpu", non_blocking=True), y.to("cpu", non_blocking=True)
            with torch.autocast("cpu", torch.bfloat16):
                loss = step(net, (x, y))
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(parameters, 1.0))
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            average(averages, parameters, 0)
            losses.append((loss.detach(), len(x)))


def sheers(calls: Calls, schedule: bool = False, **settings: Any) -> None:
    net, optimizer = network()
    trainer(max_steps=150, log_every_n_steps=1000, checkpoint=True, **settings).fit(
        net,
        counted_step(calls),
        DataLoader(data(), batch_size=32, shuffle=True),
        optimizer=optimizer,
        scheduler=OneCycleLR(optimizer, max_lr=1e-3, total_steps=200) if schedule else None,
    )


def differences(ours: Calls, theirs: Calls) -> str:
    names = {name: (ours.seen[name] - theirs.seen[name]) / STEPS for name in ours.seen | theirs.seen}
    return "\n".join(
        f"{count:+.2f} {name}" for name, count in sorted(names.items(), key=lambda x: -x[1]) if abs(count) > 0.1
    )


def test_python_calls_a_step_with_the_defaults() -> None:
    plain, ours = Calls(), Calls()
    hand_written(plain)
    sheers(ours)
    assert ours.per_step - plain.per_step <= CALLS_ALLOWED, differences(ours, plain)


def test_python_calls_a_step_with_everything_on() -> None:
    plain, ours = Calls(), Calls()
    hand_written_with_everything(plain)
    sheers(
        ours,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        callbacks=[sheer.EMA(0.999), sheer.LearningRateMonitor()],
        loggers=[sheer.Console(live=True, file=io.StringIO())],
        schedule=True,
    )
    assert ours.per_step - plain.per_step <= CALLS_ALLOWED, differences(ours, plain)


def test_nothing_of_ours_waits_for_the_device_between_log_points() -> None:
    def scalars_read(train: Any) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            train()
        return sum(e.count for e in profiled.key_averages() if e.key == "aten::_local_scalar_dense")

    def plain(steps: int) -> None:
        torch.manual_seed(0)
        net, optimizer = network()
        x, y = data()[:32]
        for _ in range(steps):
            F.cross_entropy(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def ours(steps: int) -> None:
        torch.manual_seed(0)
        net, optimizer = network()
        x, y = data()[:32]
        trainer(max_steps=steps, log_every_n_steps=10_000, gradient_clip_val=1.0).fit(
            net, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x, y)] * steps, optimizer=optimizer
        )

    # What the start and the end of a run read is the same for 5 steps and for 25.
    per_twenty_plain = scalars_read(lambda: plain(25)) - scalars_read(lambda: plain(5))
    per_twenty_ours = scalars_read(lambda: ours(25)) - scalars_read(lambda: ours(5))
    assert per_twenty_ours <= per_twenty_plain


def test_a_step_runs_the_operations_of_a_hand_written_one_and_no_others() -> None:
    """One detach of the loss, which metric and watch share, and no test for NaN before the log point."""

    def operations(train: Any) -> Counter[str]:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            train()
        return Counter({e.key: e.count for e in profiled.key_averages() if e.key.startswith("aten::")})

    def plain(steps: int) -> None:
        net, optimizer = network()
        x, y = data()[:32]
        losses = []
        for _ in range(steps):
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())

    def ours(steps: int) -> None:
        net, optimizer = network()
        x, y = data()[:32]
        trainer(max_steps=steps, log_every_n_steps=10_000).fit(
            net, lambda m, b: {"loss": F.cross_entropy(m(b[0]), b[1])}, [(x, y)] * steps, optimizer=optimizer
        )

    in_twenty_plain = operations(lambda: plain(25))
    in_twenty_plain.subtract(operations(lambda: plain(5)))
    in_twenty_ours = operations(lambda: ours(25))
    in_twenty_ours.subtract(operations(lambda: ours(5)))
    # The log point at the end stacks the values: to be read, and to be tested.
    stacked = in_twenty_ours.pop("aten::unsqueeze")
    in_twenty_ours["aten::as_strided"] -= stacked
    assert in_twenty_ours["aten::detach"] == in_twenty_plain["aten::detach"] >= 20
    assert +in_twenty_ours == +in_twenty_plain


def test_three_frames_lie_between_fit_and_the_users_step() -> None:
    frames: list[str] = []

    def step(net: nn.Module, batch: Any) -> Any:
        frames.extend(frame.filename for frame in traceback.extract_stack())
        return net(batch[0]).mean()

    net, optimizer = network()
    trainer(max_steps=1).fit(net, step, [(torch.randn(4, 16),)], optimizer=optimizer)
    ours = [name for name in frames if Path(name).is_relative_to(Path(sheer.__file__).parent)]
    assert len(ours) <= 3
    assert frames[frames.index(ours[0]) : frames.index(ours[0]) + 3] == ours


def imported_beyond_torch() -> Iterator[str]:
    code = "import sys, torch; before = set(sys.modules); import sheer; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=sys.path[0] or "."
    )
    yield from found.stdout.split()


def test_importing_sheer_imports_nothing_heavy() -> None:
    packages = {name.split(".")[0] for name in imported_beyond_torch()}
    heavy = {
        "rich",
        "tensorboard",
        "matplotlib",
        "wandb",
        "mlflow",
        "torchmetrics",
        "transformers",
        "typer",
        "pandas",
        "scipy",
    }
    assert not packages & heavy
    assert not [name for name in imported_beyond_torch() if name.startswith(("torch.distributed.", "torch._dynamo"))]
