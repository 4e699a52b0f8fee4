"""What its user has divided over ranks already: a model that came with `fully_shard`, DDP or tensor parallelism, and must fit the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sheer.distributed.mesh import Ranks, sizes_of
from sheer.distributed.tensors import is_divided_tensor
from sheer.errors import ModelError

HINT = "Give the run the mesh that you divided the model over: Trainer(parallel=mesh)."


def is_divided(model: nn.Module) -> bool:
    """Whether a model was divided by its user so that its gradients are averaged: then it is trained as it is."""
    return any(True for _ in averaging_modules(model))


def has_parts(model: nn.Module) -> bool:
    """Whether a model was divided by its user in any way: with DDP, with `fully_shard`, or its layers over tensor ranks."""
    return is_divided(model) or any(is_divided_tensor(parameter) for parameter in model.parameters())


def averaging_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model that DDP or `fully_shard` went around."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    for module in model.modules():
        if isinstance(module, (FSDPModule, DistributedDataParallel)):
            yield module


def check_given(model: nn.Module, ranks: Ranks, parallelize: Any) -> None:
    """See that a model that came divided is divided over the ranks that the run takes for those that hold its parts.

    Args:
        model: as `fit` got it.
        ranks: of the run.
        parallelize: what else is to divide it; a function is trusted to know what it does.

    Raises:
        ModelError: it is not, or would be divided twice.
    """
    if parallelize is not None and not callable(parallelize):
        raise ModelError(
            "The model came divided over ranks, and parallelize has a plan to do it again. Do one of the two."
        )
    if ranks.parallel.pp > 1:
        raise ModelError(
            f"The model came divided over ranks, and pp={ranks.parallel.pp} cuts a whole one into stages. Divide it in parallelize=fn(model, mesh)."
        )
    abstract = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if abstract:
        raise ModelError(
            f"The model came divided over ranks and on the meta device: {abstract[0]} has no values. Call model.to_empty(device=...) and "
            "initialise it, or give it undivided: then each part is initialised as it is divided."
        )
    check_places(model, ranks)


def check_places(model: nn.Module, ranks: Ranks) -> None:
    """See that the parts of a divided model lie where the run takes them to be.

    Raises:
        ModelError: they lie on other ranks, or no module gathers them.
    """
    averaged, sharing = set(ranks_with_other_data(ranks)), set(ranks_of_layers(ranks))
    gathered_by_module: set[int] = set()
    for module in averaging_modules(model):
        group = averaged_by(module)
        if group is None:
            gathered_by_module |= {id(parameter) for parameter in module.parameters()}
        elif set(group) != averaged:
            raise ModelError(
                f"DistributedDataParallel averages gradients over the ranks {group}, and the run gives other samples to each of "
                f"{sorted(averaged)}. {HINT}"
            )
    for name, parameter in model.named_parameters():
        if not is_divided_tensor(parameter):
            continue
        held = set(cast(Any, parameter).device_mesh.mesh.flatten().tolist())
        is_gathered = id(parameter) in gathered_by_module
        if not is_gathered and held == averaged != sharing:
            raise ModelError(
                f"{name} is divided over the ranks {sorted(held)}, and in no module that fully_shard went around. If they share a layer, so that "
                "they are to see the same samples, give the run your mesh: Trainer(parallel=mesh). If its parts are to be gathered, call "
                "fully_shard(model) too, last of all. A model that another fit divided is to be built anew, its weights loaded from a checkpoint."
            )
        if held not in ((averaged, set(ranks_of_stage(ranks))) if is_gathered else (sharing,)):
            raise ModelError(
                f"{name} is divided over the ranks {sorted(held)}. The run takes {sorted(averaged)} for those with other samples each, over "
                f"which gradients are averaged, and {sorted(sharing)} for those that share a layer. {HINT}"
            )


def averaged_by(module: nn.Module) -> list[int] | None:
    """Return the ranks that DDP averages gradients over; None of another module."""
    from torch.nn.parallel import DistributedDataParallel

    return dist.get_process_group_ranks(module.process_group) if isinstance(module, DistributedDataParallel) else None


def check_averaged(model: nn.Module, ranks: Ranks) -> None:
    """See that each trained parameter of a model that its user divided is in a module that averages its gradient.

    Raises:
        ModelError: one is not, so each rank would train its own.
    """
    from torch.nn.parallel import DistributedDataParallel

    if ranks.averaged == 1:
        return
    reached: set[int] = set()
    for module in averaging_modules(model):
        by_ddp = isinstance(module, DistributedDataParallel)
        reached |= {id(p) for p in module.parameters() if by_ddp or is_divided_tensor(p)}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached]
    if left:
        raise ModelError(
            f"{', '.join(left[:3])}{f' and {len(left) - 3} more' if len(left) > 3 else ''} would be trained by each rank for itself: parts of the model are "
            "wrapped by DDP or fully_shard, and these are in none. Call fully_shard(model) too, last of all."
        )


def ranks_with_other_data(ranks: Ranks) -> list[int]:
    """Return the ranks that hold the same layers as this one, itself included, and see other samples or parts of sequences."""
    return _alike(ranks, (True, False, False, False, True))


def ranks_of_layers(ranks: Ranks) -> list[int]:
    """Return the ranks that share single layers with this one."""
    return _alike(ranks, (True, True, True, True, False))


def ranks_of_stage(ranks: Ranks) -> list[int]:
    """Return the ranks that hold the same stage of the model."""
    return _alike(ranks, (True, False, False, False, False))


def _alike(ranks: Ranks, same: tuple[bool, ...]) -> list[int]:
    """Return the ranks that are in the same place as this one along some dimensions of the mesh."""
    places = torch.arange(ranks.world_size).reshape(sizes_of(ranks.parallel))
    own: Tensor = (places == ranks.rank).nonzero()[0]
    chosen = tuple(int(place) if alike else slice(None) for place, alike in zip(own, same, strict=True))
    found: list[int] = places[chosen].flatten().tolist()
    return found
