"""A checkpoint of two ranks, written in one process: a weight in two halves, one whole, an optimizer's state in halves."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sheer.checkpoint.disk import Disk
from sheer.checkpoint.layout import Part
from sheer.checkpoint.store import Content, write_checkpoint

STATE = {
    "random": {"torch": 1}, "data": None, "metrics": {}, "progress": {"step": 4, "seconds": 1.5}, "schedulers": {}, "scheduler_classes": {},
    "callbacks": {}, "loggers": {}, "scheduled_steps": None, "scaler": None, "extra": {}, "optimizers": {},
}  # fmt: skip


def weights() -> dict[str, Tensor]:
    return {
        "wide.weight": torch.arange(12.0).reshape(4, 3),
        "bias": torch.tensor(2.0),
        "narrow": torch.ones(2).bfloat16(),
    }


def write_parts(
    folder: Path, step: int = 4, run_id: str = "r", given: dict[str, Tensor] | None = None, **state: Any
) -> Path:
    """Write what two ranks would of `weights`, the first dimension of the wide one divided over them, and return the checkpoint."""
    disk, all_of_it = Disk(folder), weights() if given is None else given
    wide, name = all_of_it["wide.weight"], disk.unused(step)
    for rank in (1, 0):  # the first commits, when the other has written
        own = {"wide.weight": wide[2 * rank : 2 * rank + 2].clone()}
        parts = {"wide.weight": Part((2 * rank, 0), (4, 3))}
        tensors = {"model": own if rank else {**all_of_it, **own}, "state": {}}
        texts = {"state": {**STATE, **state} if rank == 0 else {"random": {"torch": 7}, "data": None, "metrics": {}}}
        facts = {"run_id": run_id, "metrics": {}, "settings": {}}
        content = Content(step, rank, 2, rank == 0, tensors, {"model": parts}, False, texts, facts)
        write_checkpoint(disk, name, content, 5.0, threading.Event())
    return folder / name
