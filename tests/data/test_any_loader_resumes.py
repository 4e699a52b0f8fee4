"""For any loader, number of workers, limit and step: a run that is stopped there and resumed sees the batches of one that was not."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

import sheer
from sheer.data import LengthGroupedBatches
from tests.task import trainer
from tests.test_resume import StopAt

SAMPLES, EPOCHS = 14, 3


class Noisy(Dataset[Any]):
    """Each sample with a random number."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index), torch.rand(()).item()])


class Shared(IterableDataset[Any]):
    """In an order that is drawn at the start, each worker its share."""

    def __init__(self, draws: bool) -> None:
        self.draws = draws

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share = range(first, SAMPLES, workers)
        order = torch.randperm(len(share)).tolist() if self.draws else range(len(share))
        yield from (torch.tensor([float(share[at])]) for at in order)


class Case(NamedTuple):
    kind: str
    workers: int
    persistent: bool
    limit: int | float | None
    accumulate: int


KINDS = (
    "shuffled", "in order", "a sampler", "a sampler with its generator", "a batch sampler", "alike lengths", "samples", "an iterable",
    "torchdata's", "a list", "a dict",
)  # fmt: skip


def make(case: Case) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    workers: dict[str, Any] = {"num_workers": case.workers, "persistent_workers": case.persistent}
    generator = torch.Generator().manual_seed(1)
    match case.kind:
        case "shuffled":
            return DataLoader(Noisy(), 3, shuffle=True, **workers)
        case "in order":
            return DataLoader(Noisy(), 3, drop_last=True, **workers)
        case "a sampler":
            return DataLoader(Noisy(), 3, sampler=WeightedRandomSampler(torch.ones(SAMPLES), SAMPLES), **workers)
        case "a sampler with its generator":
            sampler = SubsetRandomSampler(range(SAMPLES), generator)
            return DataLoader(Noisy(), 3, sampler=sampler, generator=generator, **workers)
        case "a batch sampler":
            batches = BatchSampler(RandomSampler(range(SAMPLES), replacement=True), 3, drop_last=False)
            return DataLoader(Noisy(), batch_sampler=batches, **workers)
        case "alike lengths":
            return DataLoader(Noisy(), batch_sampler=LengthGroupedBatches(range(1, SAMPLES + 1), 3), **workers)
        case "samples":
            return DataLoader(Noisy(5), batch_size=None, shuffle=True, **workers)
        case "an iterable":  # an order that is drawn in workers that persist is not kept, as docs/data.md says
            return DataLoader(Shared(draws=not case.persistent), 3, **workers)
        case "torchdata's":
            return StatefulDataLoader(range(SAMPLES), 3, shuffle=True, **workers)
        case "a list":
            return [torch.full((3, 1), float(number)) for number in range(5)]
        case _:
            shorter = DataLoader(Noisy(6), 3, sampler=SubsetRandomSampler(range(6)), **workers)
            shortest = DataLoader(Noisy(3), 1, shuffle=True)
            return {"a": shorter, "b": DataLoader(Noisy(), 3, shuffle=True, **workers), "c": shortest}


def plain(batch: Any) -> Any:
    return {name: part.tolist() for name, part in batch.items()} if isinstance(batch, dict) else batch.tolist()


def train(folder: Path, case: Case, stop_at: int | None = None) -> list[Any]:
    """Fit in a folder, all objects new; return what was trained on."""
    seen = []

    def look(net: nn.Module, batch: Any) -> Tensor:
        seen.append(plain(batch))
        return net(torch.rand(1, 1)).mean()  # draws between the batches, as dropout does

    sheer.seed_everything(0)
    net = nn.Linear(1, 1)
    made = trainer(
        run_dir=str(folder), resume="auto", checkpoint=True, callbacks=[StopAt(stop_at)] if stop_at else [],
        max_epochs=EPOCHS, limit_train_batches=case.limit, accumulate_grad_batches=case.accumulate,
        log_every_n_steps=1000,
    )  # fmt: skip
    try:
        made.fit(net, look, make(case), optimizer=SGD(net.parameters(), lr=0.1), resume_by_skipping=True)
    except SystemExit:
        assert stop_at
    return seen


@functools.cache
def whole(case: Case) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        return train(Path(folder), case)


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(KINDS),
    workers=st.sampled_from([0, 2]),
    persistent=st.booleans(),
    limit=st.sampled_from([None, 2, 3, 0.5]),
    accumulate=st.sampled_from([1, 2]),
    stops=st.lists(st.integers(1, EPOCHS * 5 - 1), min_size=1, max_size=2, unique=True).map(sorted),
)
def test_any_loader_resumes(
    kind: str, workers: int, persistent: bool, limit: Any, accumulate: int, stops: list[int]
) -> None:
    if kind == "an iterable" and isinstance(limit, float):
        limit = None  # a share of no length
    case = Case(kind, workers, persistent and workers > 0, limit, accumulate)
    folder = Path(tempfile.mkdtemp())
    seen = []
    for stop in [*stops, None]:
        seen += train(folder, case, stop)
    shutil.rmtree(folder)
    assert seen == whole(case)
