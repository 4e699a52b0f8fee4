"""Runs with bad batches in them, and loops written by hand that never saw these: what a run that goes back must equal."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import sheer
from sheer.checkpoint.optimizer import optimizer_state
from sheer.data import GlobalSampler
from tests.task import dataset, loader, model, plain_loader

EPOCHS, BATCHES = 3, 7
OFTEN = sheer.Rollback(max_times=9)
Where = Iterable[tuple[int, int]]  # batches: (epoch, number in it), from 0


def keys_of(where: Where) -> dict[tuple[int, int], float]:
    """Return what tells these batches from all others: the sum of their inputs."""
    batches, sampler = plain_loader()
    found = {}
    for epoch, number in where:
        sampler.set_epoch(epoch)
        found[epoch, number] = float(list(batches)[number][0].sum())
    return found


class Step:
    """A step that goes wrong on some batches: its loss is multiplied by a factor, NaN most often."""

    def __init__(self, bad: Where, factor: float = float("nan"), through: str = "loss") -> None:
        self.keys, self.factor, self.through = set(keys_of(bad).values()), factor, through
        self.seen: list[int] = []  # the steps at which it went wrong

    def __call__(self, net: nn.Module, batch: Any, step: int) -> dict[str, Tensor]:
        x, y = batch
        prediction = net(x)
        loss = F.mse_loss(prediction, y)
        if float(x.cpu().sum()) in self.keys:
            self.seen.append(step)
            if self.through == "gradient":  # of the square root of 0
                return {"loss": loss + (prediction.sum() * 0.0).abs().sqrt()}
            return {"loss": loss * self.factor}
        return {"loss": loss}


def run(
    folder: str,
    step: Any,
    *,
    rollback: sheer.Rollback | str = OFTEN,
    callbacks: Callable[[], list[Any]] = list,
    scheduler: Callable[[Any], Any] | None = lambda optimizer: StepLR(optimizer, 3, gamma=0.9),
    data: Callable[[], Any] = loader,
    val: Any = None,
    fit: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fit in `folder`, all objects new, as in a process of its own; return all that the run leaves."""
    net = model()
    sheer.seed_everything(0)
    optimizer = AdamW(net.parameters(), lr=1e-2)
    schedule = scheduler(optimizer) if scheduler is not None else None
    settings = {
        "max_epochs": EPOCHS,
        "log_every_n_steps": 2,
        "checkpoint": sheer.Checkpoint(every_n_steps=4),
        "resume": "auto",
        "device": "cpu",
        "loggers": [sheer.CSV(), sheer.Console(live=False)],
        **settings,
    }
    held = callbacks()
    trainer = sheer.Trainer(run_dir=folder, nonfinite=rollback, callbacks=held, **settings)  # type: ignore[arg-type]
    result = trainer.fit(net, step, data(), val, optimizer=optimizer, scheduler=schedule, **(fit or {}))
    return {
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "optimizer": optimizer_state(optimizer, net),
        "scheduler": schedule.state_dict() if schedule is not None else None,
        "callbacks": [
            {**callback.state_dict(), **(callback.averages() if hasattr(callback, "averages") else {})}
            for callback in held
            if hasattr(callback, "state_dict")
        ],
        "step": result.step,
        "lines": lines_of(folder),
        **randomness(),
    }


def randomness() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
    }


def lines_of(folder: str) -> list[dict[str, float]]:
    """Return the lines of the log, but for the time and the count of rollbacks."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
        line.pop("rollbacks", None)
    return lines


def progress_of(folder: str) -> dict[str, Any]:
    """Return the counters in the newest checkpoint."""
    state: dict[str, Any] = json.loads(Path(folder, "checkpoints", "last", "state.json").read_text())
    return dict(state["progress"])


def plain(
    left_out: Where,
    *,
    accumulate: int = 1,
    bf16: bool = False,
    decay: float | None = None,
    draws: bool = False,
    every: int = 2,
    gamma: float = 0.9,
    clip: float | None = None,
    options: dict[str, Any] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train by hand on all batches but these (with `accumulate`, steps by their first batch); return what `run` does."""
    net, sampler = model().to(device), GlobalSampler(dataset())
    batches = DataLoader(dataset(), 16, sampler=sampler, **(options or {}))
    sheer.seed_everything(0)
    optimizer = AdamW(net.parameters(), lr=1e-2)
    scheduler = StepLR(optimizer, 3, gamma=gamma)
    combine, averages = get_ema_multi_avg_fn(decay or 0.0), list[Tensor]()
    losses: list[tuple[float, int]] = []
    lines, step = [], 0
    gone = set(left_out)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        given = list(enumerate(batches)) if accumulate > 1 else enumerate(batches)
        groups = (
            [given[at : at + accumulate] for at in range(0, BATCHES, accumulate)]
            if accumulate > 1
            else ([one] for one in given)
        )
        kept = BATCHES - 1
        while (epoch, kept) in gone or (accumulate > 1 and (epoch, kept - kept % accumulate) in gone):
            kept -= 1
        for group in groups:
            if (epoch, group[0][0]) in gone:
                continue
            step += 1
            total = sum(len(batch[0]) for _, batch in group)
            for x, y in ([part.to(device) for part in batch] for _, batch in group):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = F.mse_loss(net(x), y)
                losses.append((loss.item(), len(x)))
                (loss * (len(x) / total) if accumulate > 1 and len(x) != total else loss).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            parameters = [p.detach() for p in net.parameters()]
            if decay is not None and averages:
                combine(averages, parameters, 0)
            elif decay is not None:
                averages = [p.clone() for p in parameters]
            ends = group[-1][0] == kept
            if step % every == 0 or (ends and epoch == EPOCHS - 1):
                mean = sum(value * size for value, size in losses) / sum(size for _, size in losses)
                lines.append({"step": step, "epoch": epoch + ends, "train/loss": mean})
                losses.clear()
    names = [name for name, _ in net.named_parameters()]
    return {
        "weights": dict(net.state_dict()),
        "optimizer": optimizer_state(optimizer, net),
        "scheduler": scheduler.state_dict(),
        "callbacks": [{"decay": decay, **dict(zip(names, averages, strict=True))}] if decay is not None else [],
        "step": step,
        "lines": lines,
        **randomness(),
    }
