"""A run that was stopped goes on bit for bit on as many ranks, and with the same samples on any other number and in any other layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import sheer
import sheer.session
from tests.distributed.features import WAYS
from tests.distributed.task import assert_same, tensor_plan, train
from tests.ranks import run_on_ranks

STEPS = 20


class Stopped(Exception):
    pass


def stop_in_step_11(step: int, model: torch.nn.Module, batch: Any) -> None:
    if step == 11:
        sheer.session.tell_other_ranks = tell_nobody  # all ranks come here, and none is to end by another's error
        raise Stopped


def tell_nobody(error: BaseException, agreement: Any) -> None:
    pass


def session(parallel: Any, folder: str, dropout: bool = False, stopped: bool = False) -> dict[str, Any] | None:
    """Train to the end, going on where an earlier session stopped; or stop behind a save, and before a log point."""
    try:
        return trained(parallel, folder, dropout, [sheer.On(step_start=stop_in_step_11)] if stopped else [])
    except Stopped:
        return None


def trained(parallel: Any, folder: str, dropout: bool, more: list[Any]) -> dict[str, Any]:
    return train(
        parallel,
        plan=tensor_plan() if getattr(parallel, "tp", 1) > 1 else None,
        folder=folder,
        max_steps=STEPS,
        checkpoint=sheer.Checkpoint(every_n_steps=5),
        resume="auto",
        monitor="val/loss",
        callbacks=[sheer.EMA(0.9), *more],
        log_every_n_steps=4,
        make=WithDropout if dropout else None,
        loader=lambda dataset: DataLoader(dataset, batch_size=16, shuffle=True),
    )


def sessions(parallel: Any, dropout: bool = False) -> list[dict[str, Any]]:
    whole = session(parallel, "runs/whole", dropout)
    assert session(parallel, "runs/parts", dropout, stopped=True) is None
    parts = session(parallel, "runs/parts", dropout)
    assert whole is not None and parts is not None
    return [whole, parts]


class WithDropout(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = torch.nn.Linear(12, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.first(x)))


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_on_as_many_ranks_it_goes_on_bit_for_bit(way: str) -> None:
    ranks, parallel = WAYS[way]
    for whole, parts in run_on_ranks(ranks, sessions, parallel, True):
        assert whole["lines"] == parts["lines"]
        assert all(torch.equal(value, parts["weights"][name]) for name, value in whole["weights"].items())


CHANGES = [
    ("one process", "FSDP2"), ("FSDP2", "one process"), ("TP x FSDP2", "DDP"), ("DDP", "HSDP"), ("HSDP", "TP"), ("FSDP2", "TP"), ("TP", "PP"),
    ("PP", "FSDP2"), ("PP x FSDP2", "one process"),
]  # fmt: skip


def numbers_drawn(parallel: Any, folder: str) -> list[float]:
    """Go on, and return what this rank would draw in its first steps."""
    drawn: list[float] = []

    def draw(step: int, model: torch.nn.Module, batch: Any) -> None:
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
        drawn.append(float(torch.rand(1, generator=generator)))

    trained(parallel, folder, False, [sheer.On(step_start=draw)])
    return drawn


@pytest.mark.parametrize(("before", "after"), [("FSDP2", "TP"), ("TP", "FSDP2")])
def test_in_another_layout_of_as_many_ranks_those_with_the_same_samples_draw_the_same_numbers(
    before: str, after: str
) -> None:
    run_on_ranks(2, session, WAYS[before][1], "runs/parts", False, True)
    one, other = run_on_ranks(2, numbers_drawn, WAYS[after][1], "runs/parts")
    assert one and (one == other) is (after == "TP")


def ranks_of(way: str) -> tuple[int, Any]:
    return (1, "auto") if way == "one process" else WAYS[way]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_on_other_ranks_it_goes_on_with_the_same_samples(before: str, after: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    os.chdir(tmp_path / "one")
    one = session("auto", "runs/whole")
    os.chdir(tmp_path)
    ranks, parallel = ranks_of(before)
    assert run_on_ranks(ranks, session, parallel, "runs/parts", False, True) == [None] * ranks
    ranks, parallel = ranks_of(after)
    for result in run_on_ranks(ranks, session, parallel, "runs/parts"):
        assert_same(one, result, logged=1e-10, weights=1e-8)
