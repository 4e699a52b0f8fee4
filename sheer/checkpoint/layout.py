"""Which part of a tensor a rank holds, and which of the ranks that hold it writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sheer.distributed.mesh import Ranks
from sheer.distributed.tensors import is_divided_tensor
from sheer.errors import RunError


@dataclass(frozen=True)
class Part:
    """A box of a tensor: where it begins in each dimension, and the shape of the whole."""

    begins: tuple[int, ...]
    shape: tuple[int, ...]


def part_of(tensor: Tensor) -> Part | None:
    """Return which part of a tensor this rank holds; None where it holds all of it.

    Raises:
        RunError: it holds several boxes, which a checkpoint cannot name.
    """
    if not is_divided_tensor(tensor):
        return None
    divided = cast(Any, tensor)
    (chunk,) = divided.__create_chunk_list__()  # how PyTorch's own checkpoints ask; there is no other public way
    if tuple(chunk.sizes) != tuple(divided.to_local().shape):
        raise RunError(
            f"A tensor of shape {list(tensor.shape)}, divided as {divided.placements} over {divided.device_mesh}, has parts that do not follow on "
            "one another. Shard along a dimension that divides evenly."
        )
    if tuple(chunk.sizes) == tuple(tensor.shape):
        return None
    return Part(tuple(chunk.offsets), tuple(tensor.shape))


def is_written_here(tensor: Tensor, ranks: Ranks | None) -> bool:
    """Whether this rank is the first of those that hold this very part of a tensor."""
    if ranks is None:
        return True
    if not is_divided_tensor(tensor):
        return ranks.leads
    divided = cast(Any, tensor)
    places = divided.device_mesh.get_coordinate()
    if any(place > 0 for place, how in zip(places, divided.placements, strict=True) if how.is_replicate()):
        return False
    everyone = ranks.mesh.mesh
    members = torch.isin(everyone, divided.device_mesh.mesh).nonzero()
    own = (everyone == ranks.rank).nonzero()[0]
    spread = (members != own).any(dim=0).tolist()  # the dimensions of the run's mesh along which the tensor's ranks lie
    alike = [name != "pp" and not across for name, across in zip(ranks.mesh.mesh_dim_names or (), spread, strict=True)]
    return not any(place > 0 for place, same in zip(own.tolist(), alike, strict=True) if same)
