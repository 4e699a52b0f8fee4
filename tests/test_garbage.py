"""Python's garbage collector while a run goes: full collections at log points alone, and all as it was afterwards."""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.task import trainer


@pytest.fixture(autouse=True)
def quick_collector() -> Iterator[None]:
    """Let full collections be due often, and leave the collector as it was."""
    before = gc.get_threshold()
    gc.unfreeze()  # what another test of this process froze before it forked
    gc.set_threshold(50, 2, 2)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


class Node:
    """Part of a ring, which only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


def littering(net: nn.Module, batch: Any, step: int) -> Tensor:
    for _ in range(500):
        Node()
    if step == 9 and batch is None:
        raise ValueError
    return net(torch.ones(2, 3)).mean()


class Seen:
    """Notes at which step a full collection begins, and whether a step was running."""

    def __init__(self) -> None:
        self.step, self.logging, self.collections = 0, False, list[tuple[int, bool]]()

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        self.step, self.logging = step, False

    def on_log(self, step: int, metrics: Any) -> None:
        self.logging = True

    def note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            self.collections.append((self.step, self.logging))


def state() -> tuple[Any, ...]:
    return gc.get_threshold(), gc.get_freeze_count(), gc.isenabled()


def fitted(seen: Seen, batches: list[Any], **settings: Any) -> None:
    net = nn.Linear(3, 1)
    gc.callbacks.append(seen.note)
    try:
        trainer(callbacks=[seen], max_steps=len(batches), log_every_n_steps=5, **settings).fit(
            net, littering, batches, optimizer=SGD(net.parameters(), lr=0.1)
        )
    finally:
        gc.callbacks.remove(seen.note)


def test_full_collections_come_at_log_points_alone() -> None:
    seen, before = Seen(), state()
    fitted(seen, [0] * 20)
    during = [(step, logging) for step, logging in seen.collections if 0 < step < 20]
    assert during == [(5, True), (10, True), (15, True)]
    assert state() == before


def test_the_collector_is_given_back_after_an_error_too() -> None:
    before = state()
    with pytest.raises(ValueError):
        fitted(Seen(), [0] * 8 + [None] * 4)
    assert state() == before


def test_the_collector_is_given_back_after_a_validation_that_was_left_too() -> None:
    def leave(net: nn.Module, batch: Any) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return littering(net, batch, 0)

    before, net = state(), nn.Linear(3, 1)
    with pytest.raises(SystemExit):
        trainer(max_steps=4, validate_every_n_steps=2, checkpoint=True).fit(
            net, littering, [0] * 4, [0] * 4, eval_step=leave, optimizer=SGD(net.parameters(), lr=0.1)
        )
    assert state() == before


def test_where_the_collector_is_off_or_frozen_by_another_it_stays_so() -> None:
    ring = Node()
    frozen = weakref.ref(ring)
    del ring
    gc.freeze()
    ring = Node()
    made_later = weakref.ref(ring)
    fitted(Seen(), [0] * 6)
    del ring
    gc.collect()
    assert frozen() is not None, "what was frozen was let go"
    assert made_later() is None, "what was not frozen by another was frozen by the run"
    gc.disable()
    try:
        seen = Seen()
        fitted(seen, [0] * 6)
        assert seen.collections == [] and not gc.isenabled()
    finally:
        gc.enable()


def test_two_loops_at_once_give_it_back_when_both_have_ended() -> None:
    before = gc.get_threshold()
    loops = []
    for name in ("one", "other"):
        net = nn.Linear(3, 1)
        optimizers = {"sgd": SGD(net.parameters(), lr=0.1)}
        loops.append(trainer(max_steps=1, run_dir=name).start(net, optimizers=optimizers))
    loops[0].finish()
    assert gc.get_threshold() != before
    loops[1].finish()
    assert gc.get_threshold() == before
