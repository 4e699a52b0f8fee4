"""Batches of samples of similar lengths, so that little is padded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from sheer.data.order import mix_seed, permutation
from sheer.errors import DataError

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class LengthGroupedBatches(Sampler[list[int]]):
    """Batches of samples of similar lengths, in an order that depends on `seed` and the epoch alone. Give it as `batch_sampler`.

    Lengths that differ by less than `tolerance` count as alike. Each epoch the samples of alike lengths are shuffled, batches are
    cut from all samples in the order of their lengths, and the batches are shuffled. A batch holds `batch_size` samples, or as
    many as fit into `max_tokens`, each padded to the longest that counts as alike; batches of the shortest hold more samples
    then. The number of batches is the same in each epoch. A run goes on inside of an epoch by drawing the indices again, and on
    several ranks each batch is divided over them, as with any batch sampler.

    Args:
        lengths: of each sample of the dataset, in any unit: tokens, frames, pixels.
        batch_size: samples in a batch; the last batch of the longest may have fewer.
        max_tokens: the most that a batch holds, padding counted in: samples x the longest.
        seed: chooses the order.
        tolerance: by what share lengths may differ and still count as alike; with more, batches are mixed more, and padded more.

    Raises:
        DataError: neither or both of `batch_size` and `max_tokens` are given, or a sample is longer than `max_tokens`.
    """

    def __init__(
        self,
        lengths: Iterable[int],
        batch_size: int | None = None,
        max_tokens: int | None = None,
        *,
        seed: int = 0,
        tolerance: float = 0.1,
    ) -> None:
        values = np.asarray(list(lengths), np.int64)
        if (batch_size is None) == (max_tokens is None):
            raise DataError("LengthGroupedBatches takes either batch_size or max_tokens: it says how large a batch is.")
        if len(values) == 0 or values.min() < 1:
            raise DataError(
                "LengthGroupedBatches needs the length of each sample, at least 1, and at least one sample."
            )
        if not tolerance > 0 or (batch_size is not None and batch_size < 1):
            raise DataError(f"batch_size must be at least 1 and tolerance above 0, not {batch_size} and {tolerance}.")
        longest = int(values.max())
        if max_tokens is not None and longest > max_tokens:
            raise DataError(
                f"Sample {int(values.argmax())} has a length of {longest}, and max_tokens is {max_tokens}: no batch can hold it."
            )
        self.seed, self.epoch = seed, 0
        self.kinds = np.floor(np.log(values) / math.log1p(tolerance)).astype(np.int64)
        self.cuts = cut_batches(self.kinds, values, batch_size, max_tokens)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __iter__(self) -> Iterator[list[int]]:
        count = len(self.kinds)
        shuffled = np.asarray(permutation(count, self.seed, self.epoch)[0:count])
        order = shuffled[np.argsort(self.kinds[shuffled], kind="stable")]
        batches = permutation(len(self), mix_seed(self.seed, 1), self.epoch)[0 : len(self)]
        for batch in batches:
            yield order[self.cuts[batch] : self.cuts[batch + 1]].tolist()


def cut_batches(kinds: Numbers, lengths: Numbers, batch_size: int | None, max_tokens: int | None) -> list[int]:
    """Return where batches begin, and the last ends, among all samples in the order of their kinds of length."""
    if batch_size is not None:
        return [*range(0, len(kinds), batch_size), len(kinds)]
    assert max_tokens is not None
    _, counts = np.unique(kinds, return_counts=True)
    stops = np.cumsum(counts)
    longest = np.maximum.reduceat(lengths[np.argsort(kinds, kind="stable")], stops - counts)
    cuts = [0]
    for first, stop, most in zip((stops - counts).tolist(), stops.tolist(), longest.tolist(), strict=True):
        size = max_tokens // most  # from here on; a batch of shorter ones may hold more already, and ends then
        while stop - cuts[-1] > size:
            cuts.append(max(first, cuts[-1] + size))
    return [*cuts, len(kinds)]
