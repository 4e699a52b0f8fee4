"""What a validation may change, so that one that is left in its middle can be saved as it was before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sheer.metrics import put_back
from sheer.random import random_state, set_random_state, snapshot


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
