"""The batches that are trained on, and where they are put."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

from sheer.data.batch import StepBatch, count_samples, move
from sheer.data.order import mix_seed
from sheer.progress import Progress
from sheer.random import seed_sample, set_random_state


@dataclass(frozen=True)
class PlainLength:
    """How long an epoch is."""

    steps_per_epoch: int


def shuffles(loader: DataLoader[Any]) -> bool:
    """Whether the order of a loader is a permutation."""
    return isinstance(loader.sampler, RandomSampler)


def plain_order(seed: int, epoch: int) -> torch.Generator:
    """Return what the order of an epoch is drawn from."""
    mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    return torch.Generator().manual_seed(mixed)


def plain_epochs(loader: Any, device: torch.device) -> Iterator[tuple[Any, bool]]:
    """Yield batches, and whether each ends its epoch, whose order depends on the seed and its number alone."""
    seed = torch.initial_seed()
    for epoch in itertools.count():
        if shuffles(loader):
            loader.sampler.generator = plain_order(seed, epoch)
        for number, batch in enumerate(loader, 1):
            if shuffles(loader):
                loader.sampler.generator = None  # the epoch's order is drawn
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

    def __init__(self, loader: Any, device: torch.device, accumulate: int) -> None:
        self.loader = loader
        self.device = device
        self.seed = torch.initial_seed()
        self.steps_per_epoch = len(loader) if accumulate == 1 else -(-len(loader) // accumulate)

    def epochs(self, epoch: int, start: int, restore_random: Callable[[], None] | None) -> Iterator[tuple[Any, bool]]:
        """Yield each batch, and whether it ends its epoch; the first is batch `start` of `epoch`."""
        for number in itertools.count(epoch):
            if shuffles(self.loader):
                self.loader.sampler.generator = plain_order(self.seed, number)
            if restore_random is not None and start == 0:  # making an iterator draws a number
                restore_random()
            for index, batch in enumerate(self.loader, 1):
                if shuffles(self.loader):
                    self.loader.sampler.generator = None  # the epoch's order is drawn
                if index > start:
                    yield move(batch, self.device), index == len(self.loader)
                elif restore_random is not None and index == start:
                    restore_random()
            start, restore_random = 0, None

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on."""
        return plain_data_state(self.loader, self.seed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the seed of the run that goes on."""
        self.seed = state["source"]["seed"]


def plain_data_state(loader: Any, seed: int) -> dict[str, Any]:
    """Return what the order of a loader depends on, as a checkpoint holds it."""
    samples = min(len(loader.dataset), len(loader) * loader.batch_size)
    order = {"seed": seed, "samples": samples, "batch_size": loader.batch_size, "shuffle": shuffles(loader)}
    source = {**order, "generators": []}
    return {"kind": "GlobalOrderSource", "batches": len(loader), "source": source, "random": None}


class PlainWorkersOrder(Sampler[tuple[int, int]]):
    """The samples of an epoch from any position on, each with a seed of its own; all depends on the seed and the epoch alone."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.seed, self.epoch, self.start = torch.initial_seed(), 0, 0

    def __len__(self) -> int:
        return len(self.loader.dataset)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = plain_order(self.seed, self.epoch)
        order = torch.randperm(len(self), generator=generator) if shuffles(self.loader) else torch.arange(len(self))
        for index in order.tolist()[self.start :]:
            yield mix_seed(self.seed, self.epoch, index), index


class PlainSeeded(Dataset[Any]):
    """A dataset that seeds what each sample draws, so that it does not matter which worker makes it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        seed, index = key
        seed_sample(seed)
        return self.dataset[index]


class PlainSeededTogether(Dataset[Any]):
    """A dataset that makes the samples of a batch at once, and seeds what they draw, so that it does not matter which worker makes them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[tuple[int, int]]) -> Any:
        seed_sample(keys[0][0])
        return self.dataset.__getitems__([index for _, index in keys])


def plain_loader_of_workers(loader: DataLoader[Any], order: PlainWorkersOrder) -> DataLoader[Any]:
    """Return a loader of the same batches in another order, whose workers draw the same numbers for a sample wherever it is made."""
    return DataLoader(
        PlainSeeded(loader.dataset),
        loader.batch_size,
        sampler=order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def plain_epochs_of_workers(loader: DataLoader[Any], device: torch.device) -> Iterator[tuple[Any, bool]]:
    """Yield batches that workers make, and whether each ends its epoch, whose order depends on the seed and its number alone."""
    order = PlainWorkersOrder(loader)
    loader = plain_loader_of_workers(loader, order)
    for epoch in itertools.count():
        order.epoch = epoch
        for number, batch in enumerate(loader, 1):
            yield move(batch, device), number == len(loader)


class PlainDataOfWorkers:
    """The batches of epoch after epoch, made by workers, from any position on."""

    def __init__(self, loader: DataLoader[Any], device: torch.device, accumulate: int) -> None:
        self.order = PlainWorkersOrder(loader)
        self.loader = plain_loader_of_workers(loader, self.order)
        self.device = device
        self.steps_per_epoch = len(loader) if accumulate == 1 else -(-len(loader) // accumulate)

    def epochs(self, epoch: int, start: int, restore_random: Callable[[], None] | None) -> Iterator[tuple[Any, bool]]:
        """Yield each batch, and whether it ends its epoch; the first is batch `start` of `epoch`."""
        for number in itertools.count(epoch):
            self.order.epoch, self.order.start = number, start * (self.loader.batch_size or 1)
            draws = start == 0 and (number == 0 or not persists(self.loader))  # making an iterator draws a number
            if restore_random is not None and draws:
                restore_random()
            batches = iter(self.loader)
            if restore_random is not None and not draws:
                restore_random()
            for index, batch in enumerate(batches, start + 1):
                yield move(batch, self.device), index == len(self.loader)
            start, restore_random = 0, None

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on."""
        return plain_data_state(self.order.loader, self.order.seed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the seed of the run that goes on."""
        self.order.seed = state["source"]["seed"]


def persists(loader: DataLoader[Any]) -> bool:
    """Whether the workers of a loader stay from epoch to epoch."""
    return loader.persistent_workers


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
        if self.accumulate == 1:
            for batch, at_end in batches:
                self.at_end = at_end
                yield StepBatch([(batch, count_samples(batch))])
        else:
            for group, at_end in plain_grouped(batches, self.accumulate):
                self.at_end = at_end
                yield StepBatch(group)

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on."""
        return self.data.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the seed of the run that goes on."""
        self.data.load_state_dict(state)


def plain_open_data(data: Any, state: dict[str, Any] | None) -> Callable[[], None] | None:
    """Bring the data to where it was saved; return what puts the random states back where the data says."""
    if data is not None and state is not None:
        data.load_state_dict(state["data"])
    return functools.partial(set_random_state, state["random"]) if state is not None else None


def plain_counted(loader: Iterable[Any], limit: int | None) -> Iterator[tuple[Any, int]]:
    """Yield batches, each with its size."""
    for batch in loader if limit is None else itertools.islice(loader, limit):
        yield batch, count_samples(batch)


def moved_list(batch: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return a batch on a device."""
    return [tensor.to(device, non_blocking=True) for tensor in batch]


def moved_tuple(batch: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Return a batch on a device."""
    return tuple([tensor.to(device, non_blocking=True) for tensor in batch])


def moved_dict(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def moved_tensor(batch: Tensor, device: torch.device) -> Tensor:
    """Return a batch on a device."""
    return batch.to(device, non_blocking=True)


def size_of_list(batch: Sequence[Tensor]) -> int:
    """Return the number of samples in a batch."""
    return len(batch[0])


def size_of_tuple(batch: Sequence[Tensor]) -> int:
    """Return the number of samples in a batch."""
    return len(batch[0])


def size_of_dict(batch: Mapping[str, Tensor]) -> int:
    """Return the number of samples in a batch."""
    return len(next(iter(batch.values())))


def size_of_tensor(batch: Tensor) -> int:
    """Return the number of samples in a batch."""
    return len(batch)
