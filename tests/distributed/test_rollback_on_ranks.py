"""Several ranks go back together, also from what only one of them sees: to the same checkpoint, and on without the same batches."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sheer
import sheer.start
from sheer.progress import Progress
from tests.distributed.features import WAYS
from tests.distributed.task import assert_same, data, tensor_plan, train
from tests.distributed.test_resume_on_other_ranks import Stopped, stop_in_step_11
from tests.faults.runs import same
from tests.ranks import run_on_ranks

SAMPLE = 37  # which one rank has in each epoch


def poisoned(model: nn.Module, batch: Any, factor: float = float("nan")) -> dict[str, Any]:
    """Multiply the loss of the sample, in training."""
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    is_it = (batch[0] == data().tensors[0][SAMPLE].to(batch[0])).all(-1)
    return {"loss": torch.where(is_it, factor if model.training else 1.0, 1.0).mul(losses).mean()}


def spiking(model: nn.Module, batch: Any) -> dict[str, Any]:
    return poisoned(model, batch, 1e4)


def trained(parallel: Any, folder: str, spikes: bool, nonfinite: Any, more: Sequence[Any] = ()) -> dict[str, Any]:
    return train(
        parallel,
        plan=tensor_plan() if getattr(parallel, "tp", 1) > 1 else None,
        run_step=spiking if spikes else poisoned,
        folder=folder,
        max_steps=20,
        nonfinite=nonfinite,
        checkpoint=sheer.Checkpoint(every_n_steps=5),
        log_every_n_steps=4,
        callbacks=[sheer.EMA(0.9), *more],
        resume="auto",
        scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.5),
    )


def progress_in(folder: str) -> dict[str, Any]:
    """Return the counters in the newest checkpoint."""
    file = min(Path(folder, "checkpoints", "last").glob("state*.json"))  # that of rank 0
    return dict(json.loads(file.read_text())["progress"])


def goes_on(parallel: Any, spikes: bool) -> dict[str, Any]:
    """Train until an error ends all ranks, between a time that they go back and the next; then to the end."""
    rollback = sheer.Rollback(max_times=9, spike=20.0 if spikes else None)
    with contextlib.suppress(Stopped):
        trained(parallel, "many/parts", spikes, rollback, [sheer.On(step_start=stop_in_step_11)])
    return trained(parallel, "many/parts", spikes, rollback)


def both(parallel: Any, spikes: bool, name: str = "many") -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Train with the sample in the data; and from the start without the batches that have it."""
    left = trained(parallel, f"{name}/bad", spikes, sheer.Rollback(max_times=9, spike=20.0 if spikes else None))
    progress = progress_in(f"{name}/bad")
    sheer.start.Progress = functools.partial(Progress, left_out=progress["left_out"])  # type: ignore[misc,assignment]
    try:
        clean = trained(parallel, f"{name}/clean", spikes, "raise")
    finally:
        sheer.start.Progress = Progress  # type: ignore[misc]
    for line in left["lines"]:
        line.pop("rollbacks", None)
    return left, clean, progress


def all_of_them(parallel: Any, spikes: bool) -> tuple[Any, ...]:
    return *both(parallel, spikes), goes_on(parallel, spikes)


@pytest.mark.parametrize(
    ("way", "spikes"),
    [("DDP", False), ("FSDP2", True), ("HSDP", False), ("TP", True), ("PP", False), ("PP x FSDP2", True)],
)
def test_ranks_go_back_together(way: str, spikes: bool) -> None:
    ranks, parallel = WAYS[way]
    alone, _, of_one = both("auto", spikes, "one")
    for left, clean, progress, parts in run_on_ranks(ranks, all_of_them, parallel, spikes):
        same(left, clean)
        for line in parts["lines"]:
            line.pop("rollbacks", None)
        same(parts, left)
        assert_same(alone, left, logged=1e-9, weights=1e-9)
        assert progress["left_out"] == of_one["left_out"]
        assert progress["rollbacks"] == len(progress["left_out"]) == (2 if spikes else 3)
