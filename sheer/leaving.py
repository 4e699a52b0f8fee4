"""Validations that are left in their middle: when, and what they may have changed, so that a run is saved as it was before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sheer.distributed.stop import StopAgreement
from sheer.metrics import put_back
from sheer.random import random_state, set_random_state, snapshot
from sheer.signals import StopSignals, is_signal


class Told:
    """Whether a run was told to stop, asked between two batches of a validation."""

    def __init__(self, signals: StopSignals, agreement: StopAgreement | None) -> None:
        self.signals, self.agreement = signals, agreement
        self.reason: str | None = None

    def to_leave(self) -> bool:
        """Whether the validation is to be left now; on several ranks all are told so at the same batch.

        What comes from a callback has time until the step ends.
        """
        received = self.signals.received
        self.reason = received if self.agreement is None else self.agreement.heard(None, received)
        return is_signal(self.reason)


@dataclass(frozen=True)
class BeforeValidation:
    """What held before a validation."""

    metrics: list[tuple[Any, dict[str, Any]]]  # the metric objects of training, which it may use too
    drawn: tuple[Any, Any, Any, Any]
    buffers: dict[str, Tensor]

    def restore(self, model: nn.Module) -> None:
        """Put all of it back."""
        put_back(self.metrics)
        set_random_state(random_state(self.drawn))
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(self.buffers[name])


def before_validation(model: nn.Module, metrics: list[tuple[Any, dict[str, Any]]]) -> BeforeValidation:
    """Note what a validation may change, besides what it puts back itself."""
    return BeforeValidation(metrics, snapshot(), {name: buffer.clone() for name, buffer in model.named_buffers()})
