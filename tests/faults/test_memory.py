"""Saves leave no memory behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.optim import AdamW

import sheer
from tests.faults.runs import in_a_process, room
from tests.faults.warm import Warm
from tests.task import loader, loss_step, model

pytestmark = pytest.mark.xdist_group("kills")


class Resident:
    """Notes the resident memory when a checkpoint is committed."""

    def __init__(self) -> None:
        self.saves, self.sizes = 0, dict[int, int]()

    def on_save(self, step: int, path: Path) -> None:
        self.saves += 1
        if self.saves in (50, 1000):
            self.sizes[self.saves] = psutil.Process().memory_info().rss


def save_often() -> tuple[int, dict[int, int]]:
    """Save after each of a thousand steps, beside training; return how many saves there were, and the memory at two of them."""
    resident, net = Resident(), model()
    trainer = sheer.Trainer(
        max_steps=1000, device="cpu", run_dir="run", callbacks=[resident, sheer.EMA(0.9)], log_every_n_steps=10,
        checkpoint=sheer.Checkpoint(every_n_steps=1, keep_last=2), loggers=[sheer.Console(live=False)],
    )  # fmt: skip
    trainer.fit(net, loss_step, loader(), optimizer=AdamW(net.parameters()))
    return resident.saves, resident.sizes


def save_in_a_process() -> Any:
    with tempfile.TemporaryDirectory(dir=room()) as folder:
        os.chdir(folder)
        code, returned = in_a_process(save_often, timeout=300.0)
        assert code == 0, returned
        os.chdir("/")
        return returned


def test_resident_memory_after_save_1000_is_that_after_save_50(warm: Warm) -> None:
    saves, sizes = warm.call(save_in_a_process)
    assert saves == 1000
    assert sizes[1000] - sizes[50] <= 16 * 2**20, sizes
    print(f"resident after save 50: {sizes[50] / 2**20:.1f} MiB; after save 1,000: {sizes[1000] / 2**20:.1f} MiB")
