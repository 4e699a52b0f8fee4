"""How a step runs where a model is divided over ranks: its micro-batches, when gradients are sent, evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from sheer.data.batch import StepBatch
from sheer.distributed.layers import Pipeline
from sheer.distributed.mesh import Ranks
from sheer.distributed.sequence import own_sequences, sharing_sequences
from sheer.metrics import Mean


def parts_of_rank(batch: StepBatch, parts: list[tuple[Any, int]], size: int | None) -> list[tuple[Any, int]]:
    """Return this rank's micro-batches of a step, as many as the rank with the most samples has: all communicate in each.

    What is missing is repeated without weight.
    """
    number = len(batch) if size is None else sum(max(1, -(-most // size)) for most in batch.largest)
    return [*parts, *[(parts[-1][0], 0)] * (number - len(parts))]


def synchronised_last(stepper: nn.Module, parts: list[tuple[Any, int]]) -> Iterable[tuple[Any, int]]:
    """Return micro-batches, of which only the backward pass of the last communicates gradients."""
    return parts if len(parts) == 1 else one_by_one(stepper, parts)


def one_by_one(stepper: nn.Module, parts: list[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
    """Yield micro-batches, the gradients of all but the last to be kept where they are."""
    for number, part in enumerate(parts, 1):
        synchronise(stepper, number == len(parts))
        yield part


def evaluate_on_ranks(
    stepper: nn.Module,
    ranks: Ranks,
    model: nn.Module,
    step_function: Callable[..., Any],
    numbered: bool,
    batch: Any,
    step: int,
) -> Any:
    """Run a step of an evaluation on several ranks; where another has the last stage of the model, it returns nothing."""
    own = own_sequences(batch, ranks)
    with sharing_sequences(model, ranks, [own]):
        if isinstance(stepper, Pipeline):
            return stepper.evaluate(step_function, own, (step,) if numbered else ())
        return step_on_ranks(stepper, step_function, numbered, own, step)


def synchronise(stepper: nn.Module, on: bool) -> None:
    """Choose whether the next backward pass brings the gradients of all ranks together."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    for module in (stepper, *stepper.children()):
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(on)
        elif isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = on  # what its `no_sync()` sets


def step_on_ranks(stepper: nn.Module, step_function: Callable[..., Any], numbered: bool, batch: Any, step: int) -> Any:
    """Run a step through the module that was wrapped for several ranks."""
    return stepper(step_function, batch, step) if numbered else stepper(step_function, batch)


def let_go(stepper: nn.Module) -> None:
    """Free the parameters that were gathered for a forward pass, which no backward pass has freed: they would not see what changes theirs."""
    from torch.distributed.fsdp import FSDPModule

    for module in stepper.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def weightless(output: Any) -> Any:
    """Return the loss in what a step returned, times 0: gradients reach what they would, and are nothing."""
    loss = output["loss"] if isinstance(output, Mapping) else output
    return {"loss": Mean(loss.total * 0, loss.count * 0) if isinstance(loss, Mean) else loss * 0}


def evaluator_of(stepper: nn.Module | None, ranks: Ranks | None) -> nn.Module | None:
    """Return what runs the steps of an evaluation: the stepper where its ranks communicate in the forward pass, else nothing."""
    from torch.nn.parallel import DistributedDataParallel

    if ranks is None or not isinstance(stepper, DistributedDataParallel):
        return stepper
    return None if ranks.parallel.cp == 1 else stepper.module
