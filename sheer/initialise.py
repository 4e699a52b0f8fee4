"""Models that were built on the meta device, without memory: given values in place, module by module."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sheer.errors import ModelError


def children_first(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model, each once, those inside of another before it."""
    seen: set[int] = set()
    yield from _children_first(model, seen)


def _children_first(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    if id(module) not in seen:
        seen.add(id(module))
        for child in module.children():
            yield from _children_first(child, seen)
        yield module


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give all that is on the meta device real values, as `initialise` does."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in children_first(model):
        initialise(module, device, made)


def initialise(module: nn.Module, device: torch.device, made: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Give a module's own parameters and buffers real values where they are on the meta device: those that its `reset_parameters` draws.

    Modules come in the order in which they were built, children first, so an unsharded model draws the same numbers.

    Args:
        module: given values, in place.
        device: where they are to be.
        made: for each abstract tensor, by its id, itself and what it became: one that several modules share stays one, with its first values.

    Raises:
        ModelError: the module has no `reset_parameters`.
    """
    held = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    abstract = {name: value for name, value in held.items() if value.is_meta}
    if not abstract:
        return
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        raise ModelError(
            f"The model is on the meta device, and {type(module).__name__}, which holds {', '.join(abstract)}, has no reset_parameters() to give "
            "them values. Add that method, or build the model on the CPU."
        )
    kept = {name: made[id(value)][1].detach().clone() for name, value in abstract.items() if id(value) in made}
    for name, value in abstract.items():
        empty = torch.empty_like(value, device=device)
        real = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
        setattr(module, name, made.setdefault(id(value), (value, real))[1])
    with torch.no_grad():
        reset()
        for name, first in kept.items():
            getattr(module, name).copy_(first)


def convert_own(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Convert a module's own floating parameters and buffers, if a dtype is given; what they hold is kept as the same objects."""
    for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if dtype is not None and value.is_floating_point() and value.dtype != dtype:
            value.data = value.data.to(dtype)
