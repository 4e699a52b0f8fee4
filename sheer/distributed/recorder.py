"""The last collectives of this rank, from PyTorch's flight recorder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch._C._distributed_c10d as c10d


@dataclass(frozen=True)
class Collective:
    """A collective that this rank has begun."""

    name: str  # with its backend, as "nccl:all_reduce"
    number: int  # among those of its group
    group: str
    shapes: list[list[int]]  # of its inputs
    waiting: bool  # whether it is not over
    began: float  # in seconds, as time.time() counts
    timeout: float  # seconds

    def __str__(self) -> str:
        where = "" if self.group in ("default_pg", "") else f" of group {self.group}"
        shapes = f" of shape {', '.join(str(shape) for shape in self.shapes)}" if self.shapes else ""
        return f"{self.name.partition(':')[2] or self.name} number {self.number}{where}{shapes}"


def recorded_collectives() -> list[Collective]:
    """Return the collectives that are remembered, the oldest first; none where the recorder is off.

    PyTorch has no public way to read its recorder from within. These two functions, for Gloo and for NCCL, are there in 2.11 to
    2.13; where one is not, nothing is known, and a time-out is explained without it.
    """
    entries: list[dict[str, Any]] = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        read = getattr(c10d, name, None)
        if read is not None:
            entries += json.loads(read()).get("entries", [])
    return sorted([from_entry(entry) for entry in entries], key=attrgetter("began"))


def from_entry(entry: dict[str, Any]) -> Collective:
    """Read one entry of the recorder."""
    group = entry.get("process_group") or [""]
    number = entry.get("p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id", 0)
    return Collective(
        name=entry.get("profiling_name", "a collective"),
        number=number,
        group=group[-1],
        shapes=entry.get("input_sizes", []),
        waiting=not entry.get("retired", True),
        began=entry.get("time_created_ns", 0) / 1e9,
        timeout=entry.get("timeout_ms", 0) / 1e3,
    )
