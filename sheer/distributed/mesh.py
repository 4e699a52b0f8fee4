"""The mesh of a run: which ranks copy the model, which share it, and which part of the data is this one's."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sheer.distributed.world import join
from sheer.errors import SettingsError
from sheer.settings import DIMENSIONS, Parallel, Parallelism

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Ranks:
    """The ranks that train together, and the place of this one among them."""

    rank: int
    world_size: int
    device: torch.device
    parallel: Parallel  # with the sizes that -1 stands for on this many ranks
    mesh: DeviceMesh  # with the dimensions of DIMENSIONS; one that the user made need not have those of one rank
    model_mesh: DeviceMesh  # what the model is divided over: the same, but "dp_shard" holds the ranks of "cp" too
    data_rank: int  # which part of each global batch is this rank's
    data_ranks: int  # how many parts there are

    @property
    def averaged(self) -> int:
        """How many ranks' gradients are averaged: those with another part of the batch, or of its sequences."""
        return self.data_ranks * self.parallel.cp

    @property
    def uses_ddp(self) -> bool:
        """Whether each rank holds the whole model."""
        return self.parallel.dp_shard == 1 and self.parallel.tp == 1 and self.parallel.pp == 1

    @property
    def reports(self) -> bool:
        """Whether what this rank measures counts: of tensor ranks, which measure the same, the first; of stages, the last."""
        return self.place("tp") == 0 and self.place("pp") == self.last_place

    @property
    def reports_first(self) -> bool:
        """Whether this is the first of the ranks whose measures count."""
        return self.reports and self.data_rank == 0 and self.place("cp") == 0

    @property
    def role(self) -> dict[str, int]:
        """What of its place in the layout decides which random numbers, metrics and data a rank has: another may not take them for its own."""
        return {"stream": self.stream, "reports": int(self.reports), "data_rank": self.data_rank}

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of those that hold the same stage of the model."""
        return self.data_rank == 0 and self.place("cp") == 0 and self.place("tp") == 0

    @property
    def last_place(self) -> int:
        """Where the last stage of a pipeline is: with schedules that go down the ranks and back again, on the first."""
        return 0 if self.parallel.pp_schedule in ("ZBVZeroBubble", "DualPipeV") else self.parallel.pp - 1

    @property
    def stream(self) -> int:
        """Which random numbers this rank draws: those with other samples, or other layers, draw their own; tensor ranks the same."""
        sequence = self.data_rank * self.parallel.cp + self.place("cp")
        return sequence * self.parallel.pp + self.place("pp")

    def place(self, dimension: str) -> int:
        """Return the place of this rank along a dimension of the mesh."""
        return self.mesh.get_local_rank(dimension) if dimension in (self.mesh.mesh_dim_names or ()) else 0

    def group(self, dimension: str) -> ProcessGroup:
        """Return the ranks along a dimension of the mesh."""
        return self.mesh.get_group(dimension)

    def sharding_mesh(self) -> DeviceMesh | None:
        """Return the mesh that `fully_shard` gets: the ranks that share the parameters, and in front of them, if any, the copies.

        None in a mesh of the user's own that has neither: there is nothing to share or to average.

        Raises:
            SettingsError: the user's own mesh has copies, and no dimension to share over, which `fully_shard` needs.
        """
        copies = self.parallel.dp_replicate > 1
        if "dp_shard" in (self.model_mesh.mesh_dim_names or ()):
            return self.model_mesh["dp_replicate", "dp_shard"] if copies else self.model_mesh["dp_shard"]
        if copies:
            raise SettingsError(
                'The mesh has "dp_replicate" and no "dp_shard", which fully_shard needs to average gradients beside other dimensions. Give '
                'it one of size 1: mesh_dim_names=("dp_replicate", "dp_shard", ...).'
            )
        return None

    def add_up(self, value: Tensor) -> Tensor:
        """Add up a tensor, in place, over the ranks whose gradients are averaged."""
        shared = self.parallel.dp_shard * self.parallel.cp
        for dimension, size in (("dp_replicate", self.parallel.dp_replicate), ("dp_shard", shared)):
            if size > 1:
                dist.all_reduce(value, group=self.model_mesh.get_group(dimension))
        return value


def form_ranks(wanted: Parallelism | Parallel, device: torch.device, given: DeviceMesh | None = None) -> Ranks | None:
    """Meet the other ranks, and return how they train together; None on one.

    Args:
        wanted: says how; a word where there is one rank.
        device: where this rank computes.
        given: a mesh of these sizes that the user made.

    Raises:
        SettingsError: the number of ranks cannot be divided as the settings say.
    """
    if not isinstance(wanted, Parallel):
        return None
    from torch.distributed.device_mesh import init_device_mesh

    place = join(wanted.timeout)
    if given is not None:
        check_mesh(given, device, place.world_size)
    parallel = sized_for(wanted, place.world_size)
    sizes = sizes_of(parallel)
    places = init_device_mesh(device.type, sizes, mesh_dim_names=DIMENSIONS) if given is None else given
    with_cp = (sizes[0], sizes[1], sizes[2] * sizes[3], sizes[4])
    names = ("pp", "dp_replicate", "dp_shard", "tp")
    return Ranks(
        rank=place.rank,
        world_size=place.world_size,
        device=device,
        parallel=parallel,
        mesh=places,
        model_mesh=places if parallel.cp == 1 else init_device_mesh(device.type, with_cp, mesh_dim_names=names),
        data_rank=place.rank // (parallel.cp * parallel.tp) % (parallel.dp_replicate * parallel.dp_shard),
        data_ranks=parallel.dp_replicate * parallel.dp_shard,
    )


def check_mesh(mesh: DeviceMesh, device: torch.device, world_size: int) -> None:
    """Raise `SettingsError` for a mesh that is not of all ranks in their order, or of another kind of device."""
    held = mesh.mesh.flatten().tolist()
    if held != list(range(world_size)):
        raise SettingsError(
            f"The mesh has the ranks {held}, and {world_size} were started. Give the whole mesh, as init_device_mesh makes it over all ranks, "
            "and not a part of it."
        )
    if mesh.device_type != device.type:
        raise SettingsError(
            f"The mesh is of {mesh.device_type!r} devices, and the run computes on {device}. Make it with init_device_mesh({device.type!r}, ...), "
            f"or set device={mesh.device_type!r}."
        )


def sizes_of(parallel: Parallel) -> tuple[int, ...]:
    """Return the sizes of the mesh's dimensions, in the order of DIMENSIONS."""
    return (parallel.pp, parallel.dp_replicate, parallel.dp_shard, parallel.cp, parallel.tp)


def sized_for(parallel: Parallel, world_size: int) -> Parallel:
    """Return the settings with the size that -1 stands for.

    Raises:
        SettingsError: the sizes do not multiply to the number of ranks.
    """
    fixed = math.prod(size for size in sizes_of(parallel) if size != -1)
    free = parallel.dp_replicate == -1 or parallel.dp_shard == -1
    said = ", ".join(f"{name}={size}" for name, size in zip(DIMENSIONS, sizes_of(parallel), strict=True) if size != 1)
    if (free and world_size % fixed) or (not free and world_size != fixed):
        wanted = f"a multiple of {fixed}" if free else str(fixed)
        raise SettingsError(f"Parallel({said}) needs {wanted} ranks, and {world_size} were started.")
    left = world_size // fixed
    return dataclasses.replace(
        parallel,
        dp_replicate=left if parallel.dp_replicate == -1 else parallel.dp_replicate,
        dp_shard=left if parallel.dp_shard == -1 else parallel.dp_shard,
    )
