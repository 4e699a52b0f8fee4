"""Step k trains on the same samples on any number of ranks, each of them once; ends are uneven and nothing hangs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

import sheer
from sheer.data.choose import make_source
from sheer.data.feed import TrainingData
from sheer.data.shares import counted_or_not, dealt
from sheer.distributed.mesh import Ranks
from sheer.progress import Progress
from tests.ranks import run_on_ranks


def place(rank: int, count: int) -> Ranks:
    """A rank's place, for what asks no other rank."""
    parallel = sheer.Parallel(dp_replicate=count, dp_shard=1)
    return Ranks(rank, count, torch.device("cpu"), parallel, None, None, rank, count)  # type: ignore[arg-type]


def samples_of_steps(loader: Any, ranks: Ranks | None, steps: int, accumulate: int, seed: int) -> list[list[list[int]]]:
    """The samples of each step, those that count, batch by batch."""
    cpu = torch.device("cpu")
    data = TrainingData(
        make_source(loader, seed=seed, device=cpu, ranks=ranks), device=cpu, accumulate=accumulate, ranks=ranks
    )
    progress, out = Progress(), []
    for step in itertools.islice(data.steps(progress), steps):
        out.append([part[0][:samples].tolist() for part, samples in step])
        assert ranks is None or step.total >= sum(samples for _, samples in step)
        progress.batch += len(step)
        if data.at_end:
            progress.epoch, progress.batch = progress.epoch + 1, 0
    return out


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    count=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    shuffle=st.booleans(),
    own_sampler=st.booleans(),
    seed=st.integers(0, 3),
)
def test_all_ranks_together_see_what_one_would(
    size: int, batch_size: int, count: int, accumulate: int, shuffle: bool, own_sampler: bool, seed: int
) -> None:
    def loader() -> DataLoader[Any]:
        dataset = TensorDataset(torch.arange(size))
        return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)

    if own_sampler:
        loader_of = lambda: [(batch[0],) for batch in loader_in_order(size, batch_size)]  # noqa: E731
    else:
        loader_of = loader
    one = samples_of_steps(loader_of(), None, 12, accumulate, seed)
    parts = [samples_of_steps(loader_of(), place(rank, count), 12, accumulate, seed) for rank in range(count)]
    together = [
        [list(itertools.chain(*batches)) for batches in zip(*step, strict=True)] for step in zip(*parts, strict=True)
    ]
    assert together == one


class FirstSlow(Dataset[Any]):
    """Numbers; the worker that makes the first is done after the other."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.5 if index == 0 else 0.0)
        return (index,)


@pytest.mark.parametrize("count", [None, 2])
def test_a_loader_whose_workers_need_no_order_is_given_one(count: int | None) -> None:
    loader = DataLoader(FirstSlow(), batch_size=4, num_workers=2, in_order=False)
    steps = samples_of_steps(loader, None if count is None else place(0, count), 3, 1, 0)
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] if count is None else [[0, 1], [4, 5], [8]]
    assert [batch for (batch,) in steps] == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_evaluated_by_ranks_is_counted_in_order(rank: int) -> None:
    own = dealt(DataLoader(FirstSlow(), batch_size=2, num_workers=2, in_order=False), None, place(rank, 2))
    assert own is not None
    counted = [(batch.tolist(), samples) for (batch,), samples in counted_or_not(own, in_step=True)]
    expected = [([0, 1], 2), ([4, 5], 2), ([8, 9], 2)] if rank == 0 else [([2, 3], 2), ([6, 7], 2), ([6, 7], 0)]
    assert counted == expected


def loader_in_order(size: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(size)), batch_size=batch_size)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


class Own(IterableDataset[torch.Tensor]):
    """Each rank's own samples: rank 0 has 5 of them, rank 1 has 9."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
        own = range(14) if rank is None else range(5) if rank == 0 else range(5, 14)
        for number in own:
            yield torch.tensor([float(number)], dtype=torch.float64)


class OwnWithState:
    """A loader that keeps its position, and gives each rank its own."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        own = 3 if rank == 0 else 5
        for number in range(self.at, own):
            self.at = (number + 1) % own
            yield torch.full((2, 1), float(number + 10 * rank), dtype=torch.float64)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def fit_on(loader: Any, parallel: Any, **options: Any) -> tuple[int, int]:
    model = Linear()
    seen: list[int] = []

    def note(step: int, model: nn.Module, batch: Any) -> None:
        seen.append(batch.total)

    trainer = sheer.Trainer(
        max_epochs=2,
        parallel=parallel,
        checkpoint=False,
        precision="64-true",
        callbacks=[sheer.On(step_start=note)],
        **options,
    )
    result = trainer.fit(model, square, loader, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3))
    return result.step, sum(seen)


def iterables(parallel: Any) -> list[Any]:
    return [
        fit_on(DataLoader(Own(), batch_size=2), parallel, run_dir="a"),
        fit_on(OwnWithState(), parallel, run_dir="b"),
        fit_on(list(torch.arange(9.0, dtype=torch.float64)[:, None].split(4)), parallel, run_dir="c"),
        fit_on(DataLoader(TensorDatasetOfOne(), batch_size=None), parallel, run_dir="d"),
    ]


class TensorDatasetOfOne(Dataset[torch.Tensor]):
    """Items that are batches already; one of them has a single sample, and there are two ranks."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(4 if index else 1, 1, dtype=torch.float64)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_with_more_batches_than_others_train_on_all(parallel: str) -> None:
    for results in run_on_ranks(2, iterables, parallel):
        assert results == [(2 * 5, 2 * 14), (2 * 5, 2 * 16), (2 * 3, 2 * 9), (2 * 3, 2 * 9)]


def with_a_distributed_sampler() -> str:
    dataset = TensorDataset(torch.arange(8.0)[:, None])
    sampler: Any = DistributedSampler(dataset, num_replicas=2, rank=0)
    with pytest.raises(sheer.DataError, match="Leave it out") as caught:
        fit_on(DataLoader(dataset, batch_size=2, sampler=sampler), "ddp")
    return str(caught.value)


def test_a_distributed_sampler_is_refused() -> None:
    assert len(set(run_on_ranks(2, with_a_distributed_sampler))) == 1


class Same:
    """An iterable that does not know of ranks."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([torch.ones(2, 1, dtype=torch.float64)] * 2)


def same_everywhere() -> None:
    with pytest.warns(sheer.SheerWarning, match="all 2 ranks began with the same batch"):
        fit_on(Same(), "ddp")


def test_iterables_that_give_all_ranks_the_same_are_warned_of() -> None:
    run_on_ranks(2, same_everywhere)
