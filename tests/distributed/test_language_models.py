"""Packed rows, batches of alike lengths and the loss without logits: on ranks as on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from sheer.data import LengthGroupedBatches, Packed
from tests.data.test_packing import LENGTH, Transformer, packed_step, texts
from tests.distributed.task import assert_same, train
from tests.ranks import run_on_ranks

SIZES = [7, 3, 30, 12, 50, 5, 9, 22, 17, 2, 40, 18, 21, 11]


def shuffled(dataset: Any) -> Any:
    return DataLoader(Packed(texts(SIZES), LENGTH), batch_size=3, shuffle=True)


def grouped(dataset: Any) -> Any:
    """Batches of more and fewer rows, as if the rows were of different lengths."""
    rows = Packed(texts(SIZES), LENGTH)
    return DataLoader(rows, batch_sampler=LengthGroupedBatches(range(1, len(rows) + 1), max_tokens=20))


def runs(parallel: Any) -> dict[str, Any]:
    return {
        loader.__name__: train(
            parallel, make=Transformer, run_step=packed_step, loader=loader, val_loader=shuffled, max_steps=9,
            optimizer=torch.optim.SGD, folder=f"runs/{parallel}-{loader.__name__}",
        )
        for loader in (shuffled, grouped)
    }  # fmt: skip


def both() -> dict[str, Any]:
    return {parallel: runs(parallel) for parallel in ("ddp", "fsdp")}


def test_runs_on_two_ranks_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = runs("auto")
    for results in run_on_ranks(2, both):
        for parallel in ("ddp", "fsdp"):
            for loader, result in results[parallel].items():
                assert_same(one[loader], result, logged=1e-10, weights=1e-8)
