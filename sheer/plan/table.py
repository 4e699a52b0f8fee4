"""An estimate as a person reads it, and whether a device has room for it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from sheer.distributed.mesh import sized_for
from sheer.errors import SettingsError
from sheer.plan.estimate import Estimate
from sheer.settings import Parallel

GIB = 2**30
DEVICES = {
    "a100-40": 39.4,
    "a100": 79.1,
    "h100": 79.1,
    "h200": 139.7,
    "b200": 178.3,
    "gh200": 94.5,
    "l4": 22.0,
    "l40s": 44.4,
    "rtx4090": 23.5,
    "rtx5090": 31.3,
    "mi300x": 191.7,
}
"""GiB of memory that drivers report, which is less than what is on the box."""
ROOM = (
    0.9  # of a device; the rest is for its context, the buffers of NCCL and cuBLAS, and what its allocator cannot use
)


def memory_named(text: str | None) -> tuple[str, int]:
    """Return the name of a device and its memory in bytes.

    Args:
        text: a name of DEVICES, or a size such as "80GiB" or "24GB"; None: this machine's accelerator, or an H100 where there is none.

    Raises:
        SettingsError: it is neither.
    """
    if text is None and torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    name = (text or "h100").lower().replace("_", "-")
    if name in DEVICES:
        return name, round(DEVICES[name] * GIB)
    match = re.fullmatch(r"([0-9.]+)\s*(gib|gb|mib|mb|g)", name)
    if match is None or match[1].count(".") > 1:
        raise SettingsError(
            f"--device-memory is a size such as 80GiB, or one of {', '.join(DEVICES)}; {text!r} is neither."
        )
    units = {"gib": GIB, "g": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}
    return name, round(float(match[1]) * units[match[2]])


def has_room(found: Estimate, memory: int) -> bool:
    """Whether a device of so many bytes has room for a step."""
    return found.peak <= memory


def report_of(found: Estimate, title: str, device: str, memory: int) -> str:
    """Return the estimate as text: tables of memory and of collectives, and what is to be known about them."""
    held, undivided = found.held, found.whole
    rows = [
        ("", f"rank {found.rank}", "whole model"),
        ("parameters", sized_as(held.parameters), sized_as(undivided.parameters)),
        *([("buffers", sized_as(held.buffers), sized_as(undivided.buffers))] if undivided.buffers else []),
        ("gradients", sized_as(held.gradients), sized_as(undivided.gradients)),
        ("optimizer state", sized_as(held.optimizer), sized_as(undivided.optimizer)),
        ("batch", sized_as(found.batch), ""),
        ("activations and temporaries, at most", sized_as(found.activations), ""),
        ("clipping and update, at most", sized_as(found.updating), ""),
        ("most in a step", sized_as(found.peak), ""),
    ]
    moved = [
        (f"{each.kind} over {each.dimension} ({each.ranks})", str(each.calls), sized_as(each.size), sized_as(each.sent))
        for each in found.traffic
    ]
    head = ("collectives of a step", "calls", "tensors", "sent by a rank")
    parts = [
        f"{title} on {number_of(found.world_size, 'rank')}: {way_of(found)}, {found.settings.precision}",
        batch_of(found),
        "",
        *aligned(rows),
        verdict(found, device, memory),
        *(["", *aligned([head, *moved])] if moved else []),
        *remarks(found),
    ]
    return "\n".join(parts) + "\n"


def way_of(found: Estimate) -> str:
    """Say how the ranks are used: FSDP2 (dp_shard=8, tp=2)."""
    parallel = found.settings.parallel
    if not isinstance(parallel, Parallel):
        return "nothing is divided"
    parallel = sized_for(parallel, found.world_size)
    sizes = {"dp_replicate": parallel.dp_replicate, "dp_shard": parallel.dp_shard, "tp": parallel.tp}
    if sizes["dp_shard"] == sizes["tp"] == 1:
        return f"DDP (dp_replicate={sizes['dp_replicate']:,})"
    kind = "HSDP" if sizes["dp_replicate"] > 1 else "FSDP2"
    return f"{kind} ({', '.join(f'{name}={size:,}' for name, size in sizes.items() if size > 1)})"


def batch_of(found: Estimate) -> str:
    """Say what a step is: samples, ranks, micro-batches."""
    each = -(-found.samples // found.data_ranks)
    idle = max(0, found.data_ranks - found.samples)
    said = f"a step: {found.samples:,} samples on {number_of(found.data_ranks, 'data rank')}, at most {each:,} on each"
    said += f", in {number_of(found.micro_batches, 'micro-batch', 'es')} of {found.micro_batch}"
    return said + (f"; {idle:,} data ranks get none: raise batch_size to at least {found.data_ranks:,}" if idle else "")


def verdict(found: Estimate, device: str, memory: int) -> str:
    """Say whether it fits."""
    part = f"{found.peak / memory:.0%} of {device} ({sized_as(memory)})"
    if not has_room(found, memory):
        return f"does not fit: {part}, {sized_as(found.peak - memory)} too much"
    if found.peak > ROOM * memory:
        return f"may not fit: {part}; keep {1 - ROOM:.0%} free for the context, NCCL and what the allocator cannot use"
    return f"fits: {part}"


def remarks(found: Estimate) -> list[str]:
    """Return what the numbers leave out."""
    left_out = []
    if found.settings.compile:
        left_out.append("compile is left out; a compiled step mostly needs less.")
    if found.settings.precision == "16-mixed":
        left_out.append("The gradient scaler is left out; it takes a few bytes.")
    return [f"note: {remark}" for remark in left_out]


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows as lines, the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def number_of(number: int, what: str, plural: str = "s") -> str:
    """Say a number of things."""
    return f"{number:,} {what}{'' if number == 1 else plural}"


def sized_as(size: int) -> str:
    """Say a number of bytes: "1.25 GiB", "312 B"."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{value:.4g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
