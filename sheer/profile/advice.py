"""What is worth trying, with the reason in numbers."""

from __future__ import annotations

import linecache
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from sheer.profile.phases import (
    BACKWARD,
    CALLBACKS,
    COPY,
    DATA,
    FORWARD,
    LOGGING,
    OPTIMIZER,
    SAVING,
    VALIDATION,
)
from sheer.profile.script import Seen
from sheer.profile.syncs import COPIED, MASKED, READ
from sheer.profile.trace import DeviceTime
from sheer.speed.ways import can_be

MOST_NAMED = 3  # changes that are named
CLEAR = 0.1  # share of a step from which on a phase is worth a change
REMEDIES = {
    READ: "return the tensor as a metric, which is read at log points",
    COPIED: "return the tensor as a metric, which is read at log points",
    MASKED: "torch.where, or a mean by weights, keeps the shape",
}
WORTH_WORKERS = 1e-3  # seconds of waiting a step: to take a batch from a worker costs the host about as much, by itself
SMALL_KERNEL = 20e-6  # seconds; a kernel that takes less is over before the host has launched the next ones


def advise(seen: Seen, shares: Mapping[str, float], whole_step: float, device: DeviceTime | None) -> list[str]:
    """Return the changes that are worth trying, those that may save most first.

    Args:
        seen: the run.
        shares: of each phase in the time of a step.
        whole_step: seconds of a step.
        device: what the device did; None: there is none.
    """
    found = [*of_host(seen, shares, whole_step), *of_syncs(seen), *of_compute(seen, shares, whole_step, device)]
    ordered = sorted(found, key=_share, reverse=True)
    return [text for _, text in ordered[:MOST_NAMED]]


def _share(advice: tuple[float, str]) -> float:
    return advice[0]


def as_percent(part: float) -> str:
    """Write a share."""
    return f"{part:.0%}"


def of_host(seen: Seen, shares: Mapping[str, float], whole_step: float) -> Iterator[tuple[float, str]]:
    """Yield what can be done about phases in which nothing is computed, each with the share of a step that it takes."""
    settings = seen.settings
    if shares[DATA] >= CLEAR and shares[DATA] * whole_step >= WORTH_WORKERS:
        yield shares[DATA], of_data(seen, shares[DATA], whole_step)
    if shares[COPY] >= CLEAR:
        workers = ", and load in workers (num_workers=2), from which batches are copied beside the computation"
        yield (
            shares[COPY],
            f"copying takes {as_percent(shares[COPY])} of a step: send less (bytes instead of floats, converted on the device)"
            + (workers if seen.workers == 0 and shares[COPY] * whole_step >= WORTH_WORKERS else ""),
        )
    if shares[LOGGING] >= CLEAR:
        yield (
            shares[LOGGING],
            f"log points take {as_percent(shares[LOGGING])} of a step: log_every_n_steps={max(50, 10 * settings.log_every_n_steps)} instead of "
            f"{settings.log_every_n_steps}",
        )
    if shares[VALIDATION] >= CLEAR:
        yield (
            shares[VALIDATION],
            f"validation takes {as_percent(shares[VALIDATION])} of the time: validate_every_n_steps, or limit_val_batches",
        )
    if shares[SAVING] >= CLEAR:
        yield (
            shares[SAVING],
            f"saving takes {as_percent(shares[SAVING])} of the time: Checkpoint(every_n_steps=...) larger",
        )
    if shares[CALLBACKS] >= CLEAR and seen.by_callback:
        slowest = max(seen.by_callback, key=seen.by_callback.__getitem__)
        yield (
            shares[CALLBACKS],
            f"callbacks take {as_percent(shares[CALLBACKS])} of a step, {slowest} the most of it: let it do less, or at log points only",
        )


def of_data(seen: Seen, part: float, whole_step: float) -> str:
    """Say what can be done about waiting for data."""
    said = f"waiting for data takes {as_percent(part)} of a step ({part * whole_step * 1e3:.3g} ms)"
    cores = os.cpu_count() or 1
    if seen.workers is None:
        return f"{said}: the loader is no DataLoader, whose workers (num_workers=2) would read beside the training"
    if seen.workers == 0:
        return f"{said}: DataLoader(..., num_workers={max(1, min(4, cores))}, persistent_workers=True) reads beside the training"
    if seen.workers < cores:
        return (
            f"{said} with {seen.workers} workers: num_workers={min(cores, 2 * seen.workers)}, or do less in the dataset"
        )
    return f"{said} with {seen.workers} workers on {cores} cores: do less in the dataset, or prepare it once beforehand"


def waits_of(seen: Seen) -> list[str]:
    """Return each line of the user's step that makes the host wait for the device; on the CPU those that would on a GPU."""
    linecache.checkcache()  # another script may have had the name
    waits = "would wait for a GPU" if seen.device.type == "cpu" else "waits for the device"
    return [
        f"{seen_from_here(file)}:{line} {waits} {count}x a step, since {what}: `{linecache.getline(file, line).strip()}`"
        for (what, file, line), count in seen.syncs.most_common()
    ]


def of_syncs(seen: Seen) -> Iterator[tuple[float, str]]:
    """Yield what can be done about such lines, ahead of all else: behind each of them the device runs dry."""
    if seen.syncs and seen.device.type != "cpu":
        (what, file, line), count = seen.syncs.most_common(1)[0]
        others = f", and {len(seen.syncs) - 1} other lines do as well" if len(seen.syncs) > 1 else ""
        yield (
            1.0,
            f"{seen_from_here(file)}:{line} waits for the device {count}x a step, since {what}{others}: {REMEDIES.get(what, 'compute it without a shape that depends on values')}",
        )


def seen_from_here(file: str) -> str:
    """Return a path as it is seen from here, where it lies below."""
    here = Path.cwd()
    path = Path(file).resolve()
    return str(path.relative_to(here)) if path.is_relative_to(here) else file


def of_compute(
    seen: Seen, shares: Mapping[str, float], whole_step: float, device: DeviceTime | None
) -> Iterator[tuple[float, str]]:
    """Yield what can be done about what is computed, each with the share of a step that it is about."""
    settings = seen.settings
    computed = shares[FORWARD] + shares[BACKWARD]
    unfused = [one for one in seen.optimizers if can_be("fused", one)]
    if unfused and shares[OPTIMIZER] >= CLEAR / 2:
        name = type(unfused[0]).__name__
        yield (
            shares[OPTIMIZER],
            f"the optimizer takes {as_percent(shares[OPTIMIZER])} of a step ({shares[OPTIMIZER] * whole_step * 1e3:.3g} ms): {name}(..., fused=True)",
        )
    if seen.parts > 1 and settings.micro_batch_size is not None:
        yield (
            computed / 2,
            f"a step runs forward {seen.parts}x: a larger micro_batch_size than {settings.micro_batch_size}, if the memory has room",
        )
    if device is None:
        if computed >= 0.5 and not settings.compile:
            yield computed / 3, f"forward and backward take {as_percent(computed)} of a step: compile=True"
        return
    idle = 1 - min(1.0, device.busy / whole_step)
    kernel = device.busy / device.kernels if device.kernels else 0.0
    if idle >= 0.3 and kernel < SMALL_KERNEL and shares[DATA] < 0.5:
        graphs = "compile=True" if settings.cuda_graph else "cuda_graph=True"
        yield (
            idle,
            f"the device is idle {as_percent(idle)} of a step, and its {device.kernels:.0f} kernels are small "
            f"({kernel * 1e6:.1f} µs each): {graphs}, or a larger batch",
        )
    if idle < 0.5 and settings.precision == "32-true":
        yield (
            1 - idle,
            f'the device works {as_percent(1 - idle)} of a step, in 32 bits: precision="bf16-mixed", or "tf32-true" for matrix products',
        )
    if idle < 0.5 and not settings.compile:
        yield (
            0.5 * (1 - idle),
            f"the device works {as_percent(1 - idle)} of a step at {device.kernels:.0f} kernels: compile=True",
        )
