"""The batches that are trained on, and where they are put."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from sheer.data.batch import StepBatch, count_samples, move
from sheer.progress import Progress


class PlainOrder(Sampler[int]):
    """The samples of an epoch, from `start` on: a permutation that depends on the seed and the epoch alone."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        seed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))
        yield from order[self.start :].tolist()


@dataclass(frozen=True)
class PlainLength:
    """How long an epoch is."""

    steps_per_epoch: int


def plain_epochs(loader: Any, device: torch.device) -> Iterator[tuple[Any, bool]]:
    """Yield batches, and whether each ends its epoch, whose order depends on the seed and its number alone."""
    seed = torch.initial_seed()
    loader.sampler.generator = order = torch.Generator()
    for epoch in itertools.count():
        order.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
        for number, batch in enumerate(loader, 1):
            yield move(batch, device), number == len(loader)


def plain_grouped(batches: Iterator[tuple[Any, bool]], size: int) -> Iterator[tuple[list[tuple[Any, int]], bool]]:
    """Yield so many batches at a time, each with its size; the last of an epoch are what is left."""
    group: list[tuple[Any, int]] = []
    for batch, at_end in batches:
        group.append((batch, count_samples(batch)))
        if len(group) == size or at_end:
            yield group, at_end
            group = []


class PlainData:
    """The batches of epoch after epoch, from any position on; the order of an epoch depends on the seed and its number alone."""

    def __init__(self, loader: DataLoader[Any], device: torch.device, accumulate: int) -> None:
        self.device = device
        self.batch_size = loader.batch_size or 1
        self.batches = len(loader)
        self.steps_per_epoch = -(-self.batches // accumulate)
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

    def epochs(self, epoch: int, start: int, restore_random: Callable[[], None] | None) -> Iterator[tuple[Any, bool]]:
        """Yield each batch, and whether it is the last of its epoch; the first is batch `start` of `epoch`."""
        for number in itertools.count(epoch):
            self.order.epoch = number
            self.order.start = start * self.batch_size
            if restore_random is not None and start == 0:  # making the iterator draws a number
                restore_random()
            batches = iter(self.loader)
            if restore_random is not None and start > 0:
                restore_random()
            for index, batch in enumerate(batches, start + 1):
                yield move(batch, self.device), index == self.batches
            start = 0
            restore_random = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on."""
        samples = min(self.order.size, self.batches * self.batch_size)
        source = {"seed": self.order.seed, "samples": samples, "batch_size": self.batch_size, "shuffle": True}
        return {
            "kind": "GlobalOrderSource",
            "batches": self.batches,
            "source": {**source, "generators": []},
            "random": None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the seed of the run that goes on."""
        self.order.seed = state["source"]["seed"]


class PlainSteps:
    """The batches of step after step, each with its size, for a loop that counts the steps itself."""

    def __init__(self, loader: DataLoader[Any], device: torch.device, accumulate: int) -> None:
        self.data = PlainData(loader, device, accumulate)
        self.accumulate = accumulate
        self.steps_per_epoch = self.data.steps_per_epoch
        self.at_end = False

    def steps(self, progress: Progress, restore_random: Callable[[], None] | None) -> Iterator[StepBatch]:
        """Yield the batches of step after step, from `progress` on."""
        batches = self.data.epochs(progress.epoch, progress.batch, restore_random)
        for group, at_end in plain_grouped(batches, self.accumulate):
            self.at_end = at_end
            yield StepBatch(group)

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on."""
        return self.data.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the seed of the run that goes on."""
        self.data.load_state_dict(state)


def plain_counted(loader: Iterable[Any], limit: int | None) -> Iterator[tuple[Any, int]]:
    """Yield batches, each with its size."""
    for batch in loader if limit is None else itertools.islice(loader, limit):
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
