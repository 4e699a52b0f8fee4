"""The batches that are trained on, and where they are put."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sheer.data.batch import StepBatch, count_samples, move
from sheer.progress import Progress


@dataclass(frozen=True)
class PlainLength:
    """How long an epoch is."""

    steps_per_epoch: int


def plain_epochs(loader: Any, device: torch.device) -> Iterator[tuple[Any, bool]]:
    """Yield batches, and whether each ends its epoch, whose order depends on the seed and its number alone."""
    seed = torch.initial_seed()
    loader.sampler.generator = order = torch.Generator()
    try:
        for epoch in itertools.count():
            order.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
            for number, batch in enumerate(loader, 1):
                yield move(batch, device), number == len(loader)
    finally:
        loader.sampler.generator = None


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

    def __init__(self, loader: Any, device: torch.device, accumulate: int) -> None:
        self.loader = loader
        self.device = device
        self.seed = torch.initial_seed()
        self.steps_per_epoch = len(loader) if accumulate == 1 else -(-len(loader) // accumulate)

    def epochs(self, epoch: int, start: int, restore_random: Callable[[], None] | None) -> Iterator[tuple[Any, bool]]:
        """Yield each batch, and whether it ends its epoch; the first is batch `start` of `epoch`."""
        order = self.loader.sampler.generator = torch.Generator()
        try:
            for number in itertools.count(epoch):
                order.manual_seed(int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0]))
                if restore_random is not None and start == 0:  # making an iterator draws a number
                    restore_random()
                for index, batch in enumerate(self.loader, 1):
                    if index > start:
                        yield move(batch, self.device), index == len(self.loader)
                    elif restore_random is not None and index == start:
                        restore_random()
                start, restore_random = 0, None
        finally:
            self.loader.sampler.generator = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on."""
        size = self.loader.batch_size
        samples = min(len(self.loader.dataset), len(self.loader) * size)
        source = {"seed": self.seed, "samples": samples, "batch_size": size, "shuffle": True, "generators": []}
        return {"kind": "GlobalOrderSource", "batches": len(self.loader), "source": source, "random": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the seed of the run that goes on."""
        self.seed = state["source"]["seed"]


PlainNoData = Any  # of a loop without a loader


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
