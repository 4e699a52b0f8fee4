"""The global order: the same samples in the same step on any number of ranks, from any position on."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sheer.data import GlobalSampler, order

sizes = st.integers(1, 300)
batch_sizes = st.integers(1, 40)


def parts(size: int, batch: int, world: int, *, start: int = 0, drop_last: bool = False) -> list[list[int]]:
    """The indices of each rank in epoch 3."""
    out = []
    for rank in range(world):
        sampler = GlobalSampler(range(size), seed=5, batch_size=batch, rank=rank, world_size=world, drop_last=drop_last)
        sampler.set_epoch(3, start)
        out.append(list(sampler))
        assert len(sampler) == len(out[-1])
    return out


def interleaved(ranks: list[list[int]], size: int, batch: int) -> list[int]:
    """Put the ranks' parts of each global batch behind one another."""
    streams = [iter(rank) for rank in ranks]
    out: list[int] = []
    for start in range(0, size, batch):
        for rank, stream in enumerate(streams):
            _, own = order.share(min(batch, size - start), rank, len(ranks))
            out += itertools.islice(stream, own)
    return out


@given(sizes, batch_sizes, st.integers(1, 8), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_number_of_ranks_sees_the_same_global_batches(size: int, batch: int, world: int, drop_last: bool) -> None:
    (alone,) = parts(size, batch, 1, drop_last=drop_last)
    assert interleaved(parts(size, batch, world, drop_last=drop_last), len(alone), batch) == alone
    assert len(set(alone)) == len(alone) == (size - size % batch if drop_last else size)


@given(sizes, batch_sizes, st.integers(1, 4), st.data())
@settings(max_examples=100, deadline=None)
def test_any_position_can_be_entered(size: int, batch: int, world: int, data: st.DataObject) -> None:
    start = batch * data.draw(st.integers(0, size // batch))
    (alone,) = parts(size, batch, 1)
    rest = parts(size, batch, world, start=start)
    assert interleaved(rest, size - start, batch) == alone[start:]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def indices(seed: int, epoch: int) -> list[int]:
        sampler = GlobalSampler(range(50), seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(3)
        return list(sampler)

    assert indices(0, 0) == indices(0, 0)
    assert len({tuple(indices(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_the_order_computed_index_by_index_is_a_permutation(size: int) -> None:
    indices = order._IndexedOrder(size, 7)[0:size]
    assert sorted(indices) == list(range(size))
    assert order._IndexedOrder(size, 7)[size // 2 : size] == indices[size // 2 :]


def test_the_order_computed_index_by_index_looks_random() -> None:
    indices = torch.tensor(order._IndexedOrder(100_000, 3)[0:100_000], dtype=torch.float64)
    positions = torch.arange(100_000, dtype=torch.float64)
    assert abs(torch.corrcoef(torch.stack([indices, positions]))[0, 1]) < 0.02
    assert abs(torch.corrcoef(torch.stack([indices[1:], indices[:-1]]))[0, 1]) < 0.02
    assert (indices[:1000].sort().values.diff() == 1).float().mean() < 0.05


def test_above_ten_million_samples_nothing_is_held() -> None:
    sampler = GlobalSampler(range(10**12), seed=1)
    sampler.set_epoch(0, 10**12 - 5)
    assert len(set(sampler)) == 5


def test_without_shuffle_the_dataset_keeps_its_order() -> None:
    assert list(GlobalSampler(range(7), shuffle=False)) == list(range(7))


def test_a_plain_dataloader_takes_it_as_its_sampler() -> None:
    data = torch.arange(20)
    batches = [batch.tolist() for batch in DataLoader(data, batch_size=8, sampler=GlobalSampler(data, seed=2))]  # type: ignore[arg-type]
    assert [len(batch) for batch in batches] == [8, 8, 4]
    assert sorted(index for batch in batches for index in batch) == list(range(20))
