"""The processes that train together: who this one is among them, and how they meet."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from sheer.errors import SettingsError

TIMEOUT = 600.0  # seconds that ranks wait for each other where no trainer has said
LETTING_GO = 0.2  # seconds that threads of the process group have to let go of what they sent last


@dataclass(frozen=True)
class World:
    """The place of this process among those that were started together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among those of this machine


def world() -> World:
    """Return this process's place, as torchrun and `sheer run` write it into the environment; alone where they did not."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    return World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def join(timeout: float = TIMEOUT) -> World:
    """Meet the other processes, once; nothing where there are none. Waits until all are there.

    Args:
        timeout: seconds after which a rank that waits for another gives up, then and in all that follows.
    """
    place = world()
    if place.world_size == 1 or dist.is_initialized():
        return place
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the flight recorder: the last collectives of each rank
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    dist.init_process_group(timeout=timedelta(seconds=timeout))
    atexit.register(leave)
    return place


def own_device(device: torch.device) -> torch.device:
    """Return the accelerator that a device without a number means: each rank of a machine has its own, and makes it the current one.

    Raises:
        SettingsError: the machine has fewer than it has ranks.
    """
    place, index = world(), str(device).partition(":")[2]
    if device.type == "cpu" or index or place.world_size == 1:
        return device
    count = torch.accelerator.device_count()
    if place.local_rank >= count:
        raise SettingsError(
            f"Rank {place.rank} is number {place.local_rank + 1} on this machine, which has {count} {device.type} devices. Start at most "
            f"{count} ranks on it (--nproc-per-node {count}), or set device='cpu'."
        )
    torch.accelerator.set_device_index(place.local_rank)
    return torch.device(device.type, place.local_rank)


def leave() -> None:
    """Part from the other processes, if this one met them.

    A thread of gloo lets go of the tensors of a collective a moment after it has said that the collective is done. If Python is closing down
    by then, that aborts the process. `destroy_process_group` does not wait for such threads where a model or mesh holds the group too
    (https://github.com/pytorch/pytorch/pull/179291), and nothing public says that they are done: on a busy machine one of nine ranks
    aborted after it had finished its work.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(LETTING_GO)


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Let rank 0 run the block before the others do: for downloads and files that are made once.

    Example:
        with sheer.rank_zero_first():
            data = download(folder)  # the others find it there
    """
    place = join()
    if place.rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if place.world_size > 1 and place.rank == 0:
            dist.barrier()
