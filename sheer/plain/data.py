"""The batches that are trained on, and where they are put."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from sheer.data.batch import count_samples, move
from sheer.progress import Progress


class PlainOrder(Sampler[int]):
    """The samples of an epoch, from `start` on: a permutation that depends on the seed and the epoch alone."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[int]:
        seed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))
        yield from order[self.start :].tolist()


class PlainData:
    """The batches of an epoch after the other, each epoch in an order of its own.

    Attributes:
        at_end: whether the batch that was yielded last is the last of its epoch.
    """

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self.device, self.batch_size = device, loader.batch_size or 1
        self.order = PlainOrder(len(loader.dataset), torch.initial_seed())  # type: ignore[arg-type]
        self.loader = DataLoader(
            loader.dataset,
            loader.batch_size,
            sampler=self.order,
            drop_last=loader.drop_last,
            collate_fn=loader.collate_fn,
            pin_memory=device.type == "cuda",
            generator=loader.generator,
        )
        self.steps_per_epoch = len(loader)
        self.at_end = False

    def steps(self, progress: Progress, restore_random: Callable[[], None] | None) -> Iterator[tuple[Any, int]]:
        """Yield each batch with its size, from `progress` on; the caller counts in `progress`."""
        while True:
            start = progress.batch
            self.order.epoch, self.order.start = progress.epoch, start * self.batch_size
            if restore_random is not None and start == 0:  # making the iterator draws a number
                restore_random()
                restore_random = None
            batches = iter(self.loader)
            if restore_random is not None:
                restore_random()
                restore_random = None
            for number, batch in enumerate(batches, start + 1):
                self.at_end = number == self.steps_per_epoch
                yield move(batch, self.device), count_samples(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on."""
        source = {"seed": self.order.seed, "samples": self.order.size, "batch_size": self.batch_size, "shuffle": True}
        return {
            "kind": "GlobalOrderSource",
            "batches": self.steps_per_epoch,
            "source": {**source, "generators": []},
            "random": None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the seed of the run that goes on."""
        self.order.seed = state["source"]["seed"]


def plain_counted(loader: Iterable[Any]) -> Iterator[tuple[Any, int]]:
    """Yield batches, each with its size."""
    for batch in loader:
        yield batch, count_samples(batch)


def moved_list(batch: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return a batch on a device."""
    return [tensor.to(device, non_blocking=True) for tensor in batch]


def moved_dict(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def moved_tensor(batch: Tensor, device: torch.device) -> Tensor:
    """Return a batch on a device."""
    return batch.to(device, non_blocking=True)


def size_of_list(batch: Sequence[Tensor]) -> int:
    """Return the number of samples in a batch."""
    return len(batch[0])


def size_of_dict(batch: Mapping[str, Tensor]) -> int:
    """Return the number of samples in a batch."""
    return len(next(iter(batch.values())))


def size_of_tensor(batch: Tensor) -> int:
    """Return the number of samples in a batch."""
    return len(batch)
