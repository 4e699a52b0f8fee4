"""How the batches of a loader are divided over ranks: each its share of every training batch, whole batches in evaluations."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler

from sheer.data.batch import StepBatch, count_samples, cut, fingerprint
from sheer.data.order import GlobalSampler, limited, share
from sheer.distributed.agree import from_rank_zero, gathered, samples_of_ranks
from sheer.distributed.mesh import Ranks
from sheer.distributed.sequence import own_sequences
from sheer.errors import DataError, SheerWarning, user_level


class Shares(Sampler[list[int]]):
    """This rank's part of each batch of indices. One that gets none of a small batch takes its first, to count for nothing.

    Attributes:
        sizes: of the batches that were drawn and not taken yet, how many samples all ranks have, and this one.
    """

    def __init__(self, batches: Iterable[list[int]], ranks: Ranks) -> None:
        self.batches, self.ranks = batches, ranks
        self.epoch = 0
        self.sizes: deque[tuple[int, int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        self.sizes.clear()
        for batch in self.batches:
            before, own = share(len(batch), self.ranks.data_rank, self.ranks.data_ranks)
            self.sizes.append((len(batch), own))
            yield batch[before : before + own] if own else batch[:1]

    def taken(self, batches: Iterable[Any]) -> Iterator[tuple[Any, int, int]]:
        """Yield the batches that a loader made of these indices, with this rank's samples and those of all ranks."""
        for batch in batches:
            total, own = self.sizes.popleft()
            yield batch, own, total


class GlobalBatches:
    """The global batches of a `GlobalSampler`'s order."""

    def __init__(self, sampler: GlobalSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        return self.sampler.batches()


def largest_share(size: int, ranks: Ranks) -> int:
    """Return how many samples the rank has that has the most of a batch."""
    return share(size, 0, ranks.data_ranks)[1]


def grouped_shares(batches: Iterator[tuple[Any, ...]], size: int, ranks: Ranks) -> Iterator[StepBatch]:
    """Put `size` batches in a step: of each this rank's part, its samples, and those of all ranks."""
    while group := list(itertools.islice(batches, size)):
        parts, own, totals = zip(*group, strict=True)
        step = StepBatch(zip(parts, own, strict=True))
        step.total, step.largest = sum(totals), [largest_share(total, ranks) for total in totals]
        yield step


def counted_steps(steps: Iterator[StepBatch], ranks: Ranks) -> Iterator[StepBatch]:
    """Yield steps of loaders that do not tell how many samples other ranks have: the ranks tell each other before each.

    A rank whose loader has ended repeats its last step without weight until all have, so none waits for another.
    """
    last = StepBatch()
    warned = False
    while True:
        step = next(steps, None)
        own = sum(samples for _, samples in step) if step is not None else 0
        counts = samples_of_ranks(own)
        if not any(counts):
            return
        if step is None:
            if not last:
                raise DataError(
                    "The training loader of this rank gave no batch, and those of others did. Give each rank at least one."
                )
            step = StepBatch((part, 0) for part, _ in last)
        elif not warned:
            warned = True
            warn_of_the_same(step)
        last = step
        note_counts(step, counts, ranks)
        yield step


def with_own_sequences(steps: Iterator[StepBatch], ranks: Ranks) -> Iterator[StepBatch]:
    """Cut this rank's part out of each sequence, where ranks share them."""
    for step in steps:
        yield step.holding((own_sequences(part, ranks), samples) for part, samples in step)


def warn_of_the_same(step: StepBatch) -> None:
    """Warn where all ranks begin with the same batch: then each trains on all of the data."""
    marks = gathered(fingerprint(step))
    if marks[0] is not None and all(mark == marks[0] for mark in marks):
        warnings.warn(
            f"The loaders of all {len(marks)} ranks began with the same batch. If each yields the whole dataset, an epoch trains on each sample "
            f"{len(marks)} times: let it yield the rank's share (trainer.rank, trainer.world_size).",
            SheerWarning,
            stacklevel=user_level(),
        )


def alone_or_counted(batch: Any, ranks: Ranks | None) -> StepBatch:
    """Return a batch that the user made as what a step trains on."""
    step = StepBatch([(batch, count_samples(batch))])
    if ranks is not None:
        note_counts(step, samples_of_ranks(step[0][1]), ranks)
    return step


def note_counts(step: StepBatch, counts: list[int], ranks: Ranks) -> None:
    """Note how many samples of a step the ranks have, which told each other."""
    step.total = sum(counts) * ranks.data_ranks // ranks.world_size
    step.largest = [max(counts)] * len(step)


def cut_shares(batches: Iterable[Any], ranks: Ranks) -> Iterator[tuple[Any, int, int]]:
    """Cut this rank's part out of batches that all ranks read whole."""
    for batch in batches:
        total = count_samples(batch)
        before, own = share(total, ranks.data_rank, ranks.data_ranks)
        yield cut(batch, total, before, before + own) if own else cut(batch, total, 0, 1), own, total


@dataclass(frozen=True)
class Dealt:
    """A rank's batches of a loader to evaluate on."""

    batches: Iterable[Any]  # at least one, so that each rank sees what a step returns
    sizes: Sequence[int] | None  # of each batch the samples, where the order tells
    counting: int  # how many of the batches are this rank's; one more than that, of another rank, is there to be run and not counted
    most: int  # batches of the rank that has the most


def dealt(loader: Any, limit: int | float | None, ranks: Ranks) -> Dealt | None:
    """Return this rank's batches of a loader, which are dealt out in turn, so that each is computed as on one rank.

    Of a map-style `DataLoader` only a rank's own are read. None: the loader is no sequence, and gives each rank its own.
    """
    place, each = ranks.data_rank, ranks.data_ranks
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        order: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        indices = list(order)
        if not isinstance(loader.sampler, SequentialSampler) or type(loader.batch_sampler) is not BatchSampler:
            indices = from_rank_zero(indices)
        indices = indices[: limited(len(indices), limit)]
        own = indices[place::each]
        sizes = [len(batch) for batch in own] if loader.batch_sampler is not None else None
        return Dealt(own_batches(loader, own or indices[:1]), sizes, len(own), -(-len(indices) // each))
    if isinstance(loader, Sequence):
        batches = loader[: limited(len(loader), limit)]
        dealt_out = batches[place::each]
        return Dealt(dealt_out or batches[:1], None, len(dealt_out), -(-len(batches) // each))
    return None


def counted_or_not(own: Dealt, in_step: bool) -> Generator[tuple[Any, int], None, None]:
    """Yield a rank's batches with their samples, 0 for those that do not count.

    Where ranks go in step, the last is repeated, without weight, until all have had as many.
    """
    given, batch = 0, None
    for batch in own.batches:
        known = own.sizes[given] if own.sizes is not None and given < own.counting else count_samples(batch)
        yield batch, known if given < own.counting else 0
        given += 1
    if given == 0:
        raise DataError("The loader to evaluate on gave no batch. It is empty, or can be iterated only once.")
    for _ in range(own.most - given if in_step else 0):
        yield batch, 0


def in_step_with_others(batches: Iterator[tuple[Any, int]], ranks: Ranks) -> Generator[tuple[Any, int], None, None]:
    """Yield the batches of a loader that gives each rank its own, and the last again, without weight, until all ranks have had theirs."""
    for step in counted_steps((StepBatch((pair,)) for pair in batches), ranks):
        yield step[0]


def own_batches(loader: DataLoader[Any], indices: list[Any]) -> DataLoader[Any]:
    """Return a plain DataLoader with the options of another, and the batches of these indices."""
    batching: dict[str, Any] = (
        {"batch_sampler": indices} if loader.batch_sampler is not None else {"sampler": indices, "batch_size": None}
    )
    return with_options_of(loader, loader.dataset, batching, pin_memory=loader.pin_memory)


def with_options_of(
    loader: DataLoader[Any], dataset: Dataset[Any], batching: dict[str, Any], *, pin_memory: bool
) -> DataLoader[Any]:
    """Make a plain DataLoader with the options of another, but for `in_order`: what is known of each batch goes by their order."""
    return DataLoader(
        dataset,
        **batching,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
