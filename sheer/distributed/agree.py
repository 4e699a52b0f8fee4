"""What ranks tell each other through the host, at points where they wait anyway: log points, validations, saves, the start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sheer.distributed.mesh import Ranks

T = TypeVar("T")
Sums = Mapping[str, tuple[float, float]]


def gathered(value: T) -> list[T]:
    """Return what each rank has for a value, in the order of the ranks. All ranks must call it."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_zero(value: T) -> T:
    """Return what rank 0 has for a value. All ranks must call it."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def agreed(ranks: Ranks | None, value: T) -> T:
    """Return the value of rank 0, so that all ranks decide alike; on one rank its own."""
    return value if ranks is None else from_rank_zero(value)


def is_other_rank(ranks: Ranks | None) -> bool:
    """Whether this rank leaves to rank 0 what is done once: folders, files, loggers, what a person reads."""
    return ranks is not None and ranks.rank > 0


def first_of(ranks: Ranks | None, reason: str | None) -> str | None:
    """Return the reason to stop that any rank has, of several that of the lowest rank."""
    if ranks is None:
        return reason
    return next((found for found in gathered(reason) if found is not None), None)


def summed(ranks: Ranks, sums: Sums) -> dict[str, tuple[float, float]]:
    """Add up totals and counts over all ranks whose measures count, name by name, in the order of the ranks."""
    out: dict[str, tuple[float, float]] = {}
    for part in gathered(dict(sums) if ranks.reports else {}):
        for name, (total, count) in part.items():
            before = out.get(name, (0.0, 0.0))
            out[name] = (before[0] + total, before[1] + count)
    return out


def over_data_ranks(ranks: Ranks | None, number: float) -> float:
    """Add up a number over the ranks that have each another part of the batch."""
    return number if ranks is None else sum(gathered(number)) * ranks.data_ranks / ranks.world_size


def any_rank(holds: bool) -> bool:
    """Whether something holds on any rank. All must call it."""
    return any(samples_of_ranks(int(holds)))


def samples_of_ranks(samples: int) -> list[int]:
    """Return how many samples each rank has in this step: a few microseconds on the host, for loaders whose order does not tell."""
    counts = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([samples]))
    return [int(count) for count in counts]
