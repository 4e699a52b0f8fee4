"""The order of the samples: a permutation of (seed, epoch), of which each rank takes its part of every batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from sheer.errors import DataError

INDEXED_ABOVE = 10_000_000  # samples; a permutation above this is computed index by index, not held
Words = np.ndarray[Any, np.dtype[np.uint64]]
_CHUNK = 8192  # indices turned into Python integers at a time


class GlobalSampler(Sampler[int]):
    """The indices of one epoch, in an order that depends on `seed` and the epoch alone.

    Every rank sees its own part of each global batch of `batch_size` samples, so the same samples are in step k on any
    number of ranks. Without `shuffle` the order is 0, 1, 2, ... Give it to a `DataLoader` as its `sampler`; a loop written
    by hand then sees what Sheer sees.

    Args:
        data: the dataset, or anything with its length.
        shuffle: permute anew each epoch, or keep the dataset's order.
        seed: chooses the permutations.
        drop_last: leave out the samples behind the last full global batch.
        batch_size: samples in a global batch; only what is divided over ranks, or cut by `drop_last`, needs it.
        rank: which part of each global batch to yield, from 0 to `world_size` - 1.
        world_size: how many parts there are.
    """

    def __init__(
        self,
        data: Sized,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.shuffle, self.seed, self.batch_size = shuffle, seed, batch_size
        self.rank, self.world_size = rank, world_size
        self.samples = len(data) - len(data) % batch_size if drop_last else len(data)
        self.total = len(data)
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration yields, from its sample `start` on (a multiple of the global batch)."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self._slices())

    def __iter__(self) -> Iterator[int]:
        order = permutation(self.total, self.seed, self.epoch) if self.shuffle else None
        slices: Iterable[tuple[int, int]] = self._slices()
        if self.world_size == 1:
            slices = ((at, min(at + _CHUNK, self.samples)) for at in range(self.start, self.samples, _CHUNK))
        for start, stop in slices:
            yield from range(start, stop) if order is None else order[start:stop]

    def batches(self) -> Iterator[list[int]]:
        """Yield the indices of each global batch, from the start that was chosen on."""
        order = permutation(self.total, self.seed, self.epoch) if self.shuffle else None
        for start in range(self.start, self.samples, self.batch_size):
            stop = min(start + self.batch_size, self.samples)
            yield list(range(start, stop)) if order is None else order[start:stop]

    def _slices(self) -> Iterator[tuple[int, int]]:
        """Where this rank's part of each global batch starts and stops in the epoch's order."""
        if self.world_size == 1:
            yield self.start, max(self.start, self.samples)
            return
        for batch_start in range(self.start, self.samples, self.batch_size):
            size = min(self.batch_size, self.samples - batch_start)
            before, own = share(size, self.rank, self.world_size)
            yield batch_start + before, batch_start + before + own


def share(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """How many of `size` samples stand before this rank's part, and how many are in it; the first ranks get one more."""
    each, more = divmod(size, world_size)
    return rank * each + min(rank, more), each + (rank < more)


class _Order:
    """A permutation that is sliced into lists of Python integers."""

    def __init__(self, indices: torch.Tensor) -> None:
        self.indices = indices

    def __getitem__(self, part: slice) -> list[int]:
        return self.indices[part].tolist()


class _IndexedOrder:
    """A permutation of 0 .. n-1 computed where it is sliced: a Feistel network of four rounds, walked until it falls below n.

    The construction is the format-preserving encryption of Black and Rogaway, "Ciphers with Arbitrary Finite Domains"
    (CT-RSA 2002), with splitmix64 as its round function. It takes no memory and no time before its first index.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self.mask = np.uint64((1 << self.half_bits) - 1)
        self.keys = np.random.SeedSequence(seed).generate_state(4, np.uint64)

    def __getitem__(self, part: slice) -> list[int]:
        indices = np.arange(*part.indices(self.size), dtype=np.uint64)
        out = self._encrypt(indices)
        while (outside := out >= self.size).any():  # at most 3 of 4 fall outside, so this ends soon
            out[outside] = self._encrypt(out[outside])
        indices_out: list[int] = out.tolist()
        return indices_out

    def _encrypt(self, values: Words) -> Words:
        bits = np.uint64(self.half_bits)
        left, right = values >> bits, values & self.mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right + key) & self.mask)
        return (left << bits) | right


def _mix(values: Words) -> Words:
    """Scramble 64-bit integers (splitmix64, Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(size: int, seed: int, epoch: int) -> _Order | _IndexedOrder:
    """Return the order of `size` samples in `epoch`, to be sliced. It depends on nothing but the three numbers."""
    mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    if size > INDEXED_ABOVE:
        return _IndexedOrder(size, mixed)
    generator = torch.Generator().manual_seed(mixed)
    return _Order(torch.randperm(size, generator=generator))


def mix_seed(*numbers: int) -> int:
    """Make one seed of 63 bits from several whole numbers, so that neighbours have nothing in common."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def limited(batches: int | None, limit: int | float | None) -> int | None:
    """Return how many batches of an epoch are used: at most an int, or a share (at least one batch) of a known number."""
    if limit is None:
        return batches
    if isinstance(limit, float):
        if batches is None:
            raise DataError(
                f"A limit of {limit} is a share of the loader's length, and the loader has none. Give a number of batches."
            )
        return max(1, int(batches * limit)) if limit > 0 else 0
    return limit if batches is None else min(limit, batches)
