"""Gradients over ranks: their global norm, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from sheer.distributed.mesh import Ranks
from sheer.distributed.tensors import whole


def global_norm(gradients: Iterable[Tensor], ranks: Ranks | None, norm_type: float = 2.0) -> Tensor:
    """Return the norm of all gradients of a model, as a scalar.

    Whichever rank holds them, it is the same on all.
    """
    if ranks is None:
        return get_total_norm(list(gradients), norm_type)
    groups = by_mesh(gradients)
    if len(groups) == 1 and ranks.parallel.pp == 1:
        return whole(get_total_norm(groups[0] if groups else [], norm_type))
    norms = [whole(get_total_norm(group, norm_type)) for group in groups]
    norm = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=ranks.device)
    if ranks.parallel.pp > 1:
        stages = [torch.empty_like(norm) for _ in range(ranks.parallel.pp)]
        dist.all_gather(stages, norm, group=ranks.group("pp"))
        norm = torch.linalg.vector_norm(torch.stack(stages), norm_type)
    return norm


def clip_to(parameters: Sequence[nn.Parameter], most: float, norm: Tensor) -> None:
    """Scale all gradients so that their global norm is at most `most`."""
    for group in by_mesh(parameter for parameter in parameters if parameter.grad is not None):
        clip_grads_with_norm_(group, most, norm)


def clip_values_to(parameters: Sequence[nn.Parameter], most: float) -> None:
    """Bound each entry of all gradients to `most`."""
    for group in by_mesh(parameter for parameter in parameters if parameter.grad is not None):
        clip_grad_value_(group, most)


def mean_over_ranks(count: Tensor | float, ranks: Ranks) -> Tensor:
    """Return the mean of a count over the ranks whose gradients are averaged; nothing waits for the device."""
    return ranks.add_up(torch.as_tensor(count, dtype=torch.float64, device=ranks.device).clone()) / ranks.averaged


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors by the mesh that they are divided over: one operation takes only those of one."""
    from torch.distributed.tensor import DTensor

    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())
