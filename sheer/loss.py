"""The loss in what a step returned, or what to say where there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sheer.data.batch import describe
from sheer.errors import StepError
from sheer.metrics import Mean

Step = Callable[..., Any]


def loss_in(step: Step, output: object) -> Any:
    """Return the loss in what a step returned.

    Raises:
        StepError: it is no mapping, or has no "loss".
    """
    if not isinstance(output, Mapping) or "loss" not in output:
        raise StepError(no_loss(step, output))
    return output["loss"]


def no_loss(step: Step, output: object) -> str:
    """Say why what a step returned cannot be trained on."""
    name = getattr(step, "__qualname__", "the step")
    loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
    wanted = 'Return the loss as a scalar tensor, or a mapping with it under "loss".'
    if output is None:
        return f"{name} returned None; is there a `return` missing? {wanted}"
    if isinstance(output, Mapping) and "loss" not in output:
        return f'{name} returned a mapping without "loss"; it has {list(output)}. {wanted}'
    if isinstance(loss, Mean):
        return f"{name} returned a Mean whose total is not a scalar tensor that needs gradients: {describe(loss.total)}. {wanted}"
    if isinstance(loss, (tuple, list)):
        return (
            f"{name} returned a {type(loss).__name__} of {len(loss)}. Which of them is the loss cannot be known. {wanted} "
            "A total with its count is written sheer.Mean(total, count)."
        )
    if not isinstance(loss, Tensor) and isinstance(getattr(loss, "loss", None), Tensor):
        return f"{name} returned a {type(loss).__name__}. Return its loss: output.loss. {wanted}"
    if not isinstance(loss, Tensor):
        return f"{name} returned a {type(loss).__name__} as its loss. {wanted} A number on the host has no gradient: do not call .item()."
    if loss.numel() != 1:
        return f"{name} returned a loss of shape {list(loss.shape)}. {wanted} Reduce it with .mean(), or to sheer.mean(values, mask)."
    return (
        f"{name} returned a loss without a gradient. It was detached, computed under no_grad, or no parameter that it depends on has "
        "requires_grad. Return the loss as the model's own operations gave it."
    )
