"""What stands for the model in a step where no rank holds all of it: it tells what it is called with, or answers with an output.

A step must call `model(...)` exactly once. What it calls by position goes to the first stage; what it calls by keyword, all stages get.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sheer.errors import DataError, StepError
from sheer.loss import Step
from sheer.metrics import Mean
from sheer.random import random_state, seed_sample, set_random_state

_ONCE = "With pp > 1 the step must call model(...) exactly once"


@dataclass(frozen=True)
class ModelCall:
    """What the step calls the model with."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def shapes(self) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
        """Return name, shape and type of each tensor."""
        values = [*((f"argument {i}", value) for i, value in enumerate(self.arguments)), *self.keywords.items()]
        return tuple((name, tuple(value.shape), value.dtype) for name, value in values if isinstance(value, Tensor))


class _CalledError(BaseException):
    """Ends a step at its call of the model; no `except Exception` of the user's holds it."""

    def __init__(self, call: ModelCall) -> None:
        self.call = call


class ModelStandIn:
    """Stands for the model in a step: ends it at the first call, or answers with an output, once."""

    def __init__(self, training: bool, answers: bool, output: Any = None) -> None:
        self.training, self._answers, self._output = training, answers, output
        self._calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Be called as the model is."""
        if not self._answers:
            raise _CalledError(ModelCall(args, kwargs))
        self._calls += 1
        if self._calls > 1:
            raise StepError(f"{_ONCE}; it called it again. Call it on both inputs together, and take the output apart.")
        return self._output

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise StepError(f"{_ONCE}, and use nothing else of it: no rank holds all of it. It used model.{name}.")


def recorded_call(step_function: Step, batch: Any, more: tuple[Any, ...], training: bool) -> ModelCall:
    """Run a step up to its call of the model, and return what it calls it with.

    Raises:
        StepError: it does not call it, or with what cannot be handed to the stages.
    """
    try:
        step_function(ModelStandIn(training, answers=False), batch, *more)
    except _CalledError as called:
        call = called.call
    else:
        raise StepError(f"{_ONCE}; it did not call it.")
    if not call.arguments or not all(isinstance(argument, Tensor) for argument in call.arguments):
        raise StepError(
            f"{_ONCE}, with the tensors that go into the first stage by position, and what every stage needs (a mask, a flag) by keyword. It was "
            f"called with {[type(argument).__name__ for argument in call.arguments]} by position and {list(call.keywords)} by keyword."
        )
    if any(isinstance(value, Tensor) and value.requires_grad for value in (*call.arguments, *call.keywords.values())):
        raise StepError(
            f"{_ONCE}, on data. It was called on a tensor that needs gradients, which would end at the model."
        )
    return call


def answered(step_function: Step, batch: Any, more: tuple[Any, ...], training: bool, output: Any) -> Any:
    """Run a step with a model that answers with `output`, and return what it returns.

    Raises:
        StepError: it does not call the model once.
    """
    stand_in = ModelStandIn(training, answers=True, output=output)
    result = step_function(stand_in, batch, *more)
    if stand_in._calls == 0:
        raise StepError(f"{_ONCE}; it did not call it.")
    return result


def refuse_unequal(calls: Sequence[ModelCall]) -> None:
    """See that all micro-batches of a step have the same shapes.

    Raises:
        DataError: they have not.
    """
    for index, call in enumerate(calls):
        if call.shapes() != calls[0].shapes():
            first, other = ([f"{name} {list(shape)}" for name, shape, _ in one.shapes()] for one in (calls[0], call))
            raise DataError(
                f"A pipeline needs micro-batches of equal shapes: the model is called with {', '.join(first)} in the first of this step, "
                f"and with {', '.join(other)} in number {index + 1} of {len(calls)}. Choose a micro_batch_size that divides the "
                "batch_size, set drop_last=True, and pad sequences to one length."
            )


def detached(output: Any) -> Any:
    """Return what a step returned without the graph behind it."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, Mean):
        return Mean(detached(output.total), detached(output.count))
    if isinstance(output, Mapping):
        return {name: detached(value) for name, value in output.items()}
    return output


@contextmanager
def drawing_alike(seed: int, index: int, device: torch.device) -> Iterator[None]:
    """Let all random numbers of a block follow from a seed and a micro-batch; then go on with those from before."""
    before = random_state()
    own = (seed * 1_000_003 + index) % 2**32
    seed_sample(own)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(own)
    try:
        yield
    finally:
        set_random_state(before)
