"""Several ranks: how they meet, how the model and each batch are divided among them, and what they add up."""

from __future__ import annotations

import atexit
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from sheer.compilation import compile_model
from sheer.data.batch import move
from sheer.data.order import share
from sheer.distributed.agree import from_rank_zero, gathered
from sheer.distributed.wrap import StepModule
from sheer.plain.data import plain_order, shuffles
from sheer.plain.logs import plain_console_log, plain_log
from sheer.run import Run


@dataclass(frozen=True)
class PlainRanks:
    """The ranks that train together, and the place of this one among them."""

    rank: int
    world_size: int
    data_rank: int  # which part of each batch is this rank's
    data_ranks: int  # how many parts there are
    mesh: DeviceMesh  # the ranks by what they share


@dataclass(frozen=True)
class PlainStepBatch:
    """What one step trains on: this rank's part of it, and what is known of the others'."""

    parts: list[tuple[Any, int]]
    total: int
    largest: list[int]


def plain_own_device(device: torch.device) -> torch.device:
    """Return the accelerator that is this rank's own, and make it the current one."""
    if device.type == "cpu":
        return device
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    return torch.device(device.type, int(os.environ["LOCAL_RANK"]))


def plain_join(seconds: float) -> None:
    """Meet the other ranks; from then on each waits for the others at most so long."""
    dist.init_process_group(timeout=timedelta(seconds=seconds))
    atexit.register(time.sleep, 0.2)  # last at exit: a thread of gloo that lets go of a tensor later aborts the process
    atexit.register(dist.destroy_process_group)


def plain_mesh(device: torch.device, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Return the ranks by what they share."""
    return init_device_mesh(device.type, sizes, mesh_dim_names=names)


def plain_ddp(model: nn.Module, device: torch.device, find_unused: bool) -> nn.Module:
    """Wrap a model that each rank holds as a whole; the weights of rank 0 become those of all."""
    return DistributedDataParallel(
        StepModule(model.to(device)),
        device_ids=None if device.type == "cpu" else [device.index],
        find_unused_parameters=find_unused,
        gradient_as_bucket_view=True,
    )


def plain_same_on_all_ranks(model: nn.Module) -> None:
    """Make the weights and buffers of rank 0 those of all ranks."""
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), 0)


def plain_same_buffers(model: nn.Module, ranks: PlainRanks) -> None:
    """Make the buffers of rank 0, such as the statistics of batch norms, those of all ranks."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def plain_shard(
    model: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    reshard: bool,
    compiled: bool | str,
    tensor_mesh: DeviceMesh | None,
    plan: Mapping[str, Any],
) -> nn.Module:
    """Shard a model's parameters over ranks: each unit gathers its own when it runs, what is left belongs to the whole."""
    plain_same_on_all_ranks(model)
    if tensor_mesh is not None:
        parallelize_module(model, tensor_mesh, dict(plan))
    for unit in units:
        if compiled:
            compile_model(unit, None if compiled in (True, "blocks") else str(compiled))
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    stepper = StepModule(model)
    fully_shard(stepper, mesh=mesh, mp_policy=policy)
    return stepper


def plain_repoint(optimizers: Mapping[str, Any], before: Mapping[int, str], model: nn.Module) -> None:
    """Point optimizers that were built before the model was divided at the parameters that it has now, by their names."""
    now = dict(model.named_parameters())
    for built in optimizers.values():
        for group in built.param_groups:
            group["params"] = [now[before[id(parameter)]] for parameter in group["params"]]


def plain_synchronised_ddp(stepper: Any, parts: list[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
    """Yield micro-batches, of which only the backward pass of the last communicates gradients."""
    for number, (part, samples) in enumerate(parts, 1):
        stepper.require_backward_grad_sync = number == len(parts)
        yield part, samples


def plain_synchronised_shards(stepper: Any, parts: list[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
    """Yield micro-batches, of which only the backward pass of the last communicates gradients."""
    for number, (part, samples) in enumerate(parts, 1):
        stepper.set_requires_gradient_sync(number == len(parts))
        yield part, samples


def plain_whole(tensor: Tensor) -> Tensor:
    """Return a tensor's full value, on each rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_mean_over_ranks(count: Any, device: torch.device, ranks: PlainRanks, dimensions: Sequence[str]) -> Tensor:
    """Return the mean of a count over the ranks whose gradients are averaged."""
    total = torch.as_tensor(count, dtype=torch.float64, device=device).clone()
    for dimension in dimensions:
        dist.all_reduce(total, group=ranks.mesh.get_group(dimension))
    return total / ranks.data_ranks


def plain_mean_over_all(count: Any, device: torch.device, ranks: PlainRanks) -> Tensor:
    """Return the mean of a count over all ranks."""
    total = torch.as_tensor(count, dtype=torch.float64, device=device).clone()
    dist.all_reduce(total)
    return total / ranks.data_ranks


def plain_shared_epochs(loader: Any, device: torch.device, ranks: PlainRanks) -> Iterator[tuple[Any, int, int, bool]]:
    """Yield this rank's part of each batch, its samples, those of the whole batch, and whether that ends its epoch.

    One that gets none of a small batch takes its first, to count for nothing. All ranks have the same order, which depends on the seed
    of rank 0 and the number of the epoch alone.
    """
    seed = from_rank_zero(torch.initial_seed())
    for epoch in itertools.count():
        if shuffles(loader):
            loader.sampler.generator = plain_order(seed, epoch)
        batches = list(loader.batch_sampler)
        if shuffles(loader):
            loader.sampler.generator = None
        shares = [share(len(batch), ranks.data_rank, ranks.data_ranks) for batch in batches]
        own = [batch[start : start + size] or batch[:1] for batch, (start, size) in zip(batches, shares, strict=True)]
        shared = DataLoader(
            loader.dataset, batch_sampler=own, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory
        )
        for number, part in enumerate(shared):
            yield move(part, device), shares[number][1], len(batches[number]), number + 1 == len(batches)


def plain_grouped_shares(
    batches: Iterator[tuple[Any, int, int, bool]], size: int
) -> Iterator[tuple[list[tuple[Any, int]], list[int], bool]]:
    """Yield so many batches at a time, of each this rank's part and how many samples all have; the last of an epoch are what is left."""
    parts: list[tuple[Any, int]] = []
    totals: list[int] = []
    for part, samples, total, at_end in batches:
        parts.append((part, samples))
        totals.append(total)
        if len(parts) == size or at_end:
            yield parts, totals, at_end
            parts, totals = [], []


def plain_dealt(loader: Any, limit: int | None, ranks: PlainRanks, together: bool) -> Iterator[tuple[Any, int]]:
    """Yield this rank's batches of a loader, which are dealt out in turn, each with its samples.

    One that counts for nothing has 0. Where the ranks compute each batch together, all have as many.
    """
    batches = list(loader.batch_sampler)[:limit]
    own = batches[ranks.data_rank :: ranks.data_ranks]
    dealt_out = DataLoader(
        loader.dataset,
        batch_sampler=own or batches[:1],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
    )
    for number, part in enumerate(dealt_out):
        yield part, len(own[number]) if own else 0
    if together:
        for _ in range(-(-len(batches) // ranks.data_ranks) - max(1, len(own))):
            yield part, 0


def plain_rank_zero_report(run: Run, metrics: dict[str, float]) -> None:
    """Hand metrics to the loggers and the console, on rank 0."""
    if run.ranks is not None and run.ranks.rank == 0:
        record = {"epoch": run.progress.epoch, **metrics}
        plain_log(run, run.progress.step, record)
        plain_console_log(run.progress.step, metrics)


def plain_check_on_ranks(watched: list[tuple[int, str, Tensor]]) -> None:
    """Raise an error that names the first value since the last check that was NaN or infinite, on any rank."""
    own = [(at, what) for at, what, scalar in watched if not scalar.isfinite()]
    bad = [each for found in gathered(own) for each in found]
    watched.clear()
    if bad:
        raise FloatingPointError(f"The {min(bad)[1]} became NaN or infinite at step {min(bad)[0]}.")
