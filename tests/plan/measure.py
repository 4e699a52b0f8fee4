"""What a training really holds and sends: its collectives in the third step, its memory in those behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.autograd.profiler import profile
from torch.optim import Optimizer

from sheer.data.batch import tensors_in
from sheer.events import RunInfo
from sheer.plan.estimate import Held, dimensions_of
from sheer.plan.ledger import Ledger, Traffic, state_tensors, storage_bytes


class Measure:
    """A callback."""

    def __init__(self) -> None:
        self.held: Held
        self.traffic: tuple[Traffic, ...]
        # Bytes that a step took beyond those that were there when it began. Of several steps the least: gloo's threads keep tensors for
        # a moment longer than it takes, at one that differs from run to run.
        self.most = 0

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        self.optimizer, self.ledger = optimizers["optimizer"], Ledger(dimensions_of(info.ranks))

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        self.batch = storage_bytes(tensors_in(list(batch)))  # type: ignore[arg-type]
        if step == 3:
            self.ledger.__enter__()
        if step > 3:
            self.profile = profile(profile_memory=True)
            self.profile.__enter__()

    def on_gradients(self, step: int, model: nn.Module) -> None:
        self.gradients = storage_bytes(parameter.grad for parameter in model.parameters())

    def on_step_end(self, step: int, model: nn.Module) -> None:
        if step == 3:
            self.ledger.__exit__(None, None, None)
            self.traffic = self.ledger.moved()
        if step > 3:
            self.profile.__exit__(None, None, None)
            most = most_allocated(self.profile)
            self.most = min(most, self.most) if step > 4 else most
            self.held = Held(
                storage_bytes(model.parameters()),
                storage_bytes(model.buffers()),
                self.gradients,
                storage_bytes(state_tensors(self.optimizer)),
            )


def most_allocated(recorded: profile) -> int:
    """Return the most bytes that PyTorch's allocator had given out at any time of a profile, over those at its start."""
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


MEASURE = Measure()
