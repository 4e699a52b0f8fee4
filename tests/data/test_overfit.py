"""`overfit_batches`: the same batches in each epoch, whatever the loader; what may give others is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler

import sheer
from tests.data.test_combined import numbers
from tests.mistakes.common import refused
from tests.task import dataset, trainer
from tests.test_resume import StopAt, Stream, generated


def weighted(generator: torch.Generator | None = None, **options: Any) -> DataLoader[Any]:
    sampler = WeightedRandomSampler(torch.arange(1.0, 21.0), 20, generator=generator)
    return DataLoader(numbers(20), batch_size=2, sampler=sampler, generator=generator, **options)


def shuffled_batches() -> DataLoader[Any]:
    return DataLoader(numbers(20), batch_sampler=BatchSampler(RandomSampler(range(20), replacement=True), 2, False))


LOADERS: dict[str, Callable[[], Any]] = {
    "in its default order": lambda: DataLoader(numbers(20), batch_size=2, shuffle=True),
    "with a sampler": weighted,
    "with a sampler that shares its generator": lambda: weighted(torch.Generator().manual_seed(3)),
    "with a sampler, in workers": lambda: weighted(num_workers=2),
    "with a sampler, in workers that persist": lambda: weighted(num_workers=1, persistent_workers=True),
    "with a batch sampler": shuffled_batches,
    "a dict": lambda: {
        "a": weighted(), "b": DataLoader(numbers(4), batch_size=2, shuffle=True),
        "c": DataLoader(numbers(6), batch_size=2, sampler=RandomSampler(range(6)), num_workers=1, persistent_workers=True),
    },
    "a list": lambda: [[torch.tensor([number])] for number in range(5)],
}  # fmt: skip


def plain(batch: Any) -> Any:
    return {name: part[0].tolist() for name, part in batch.items()} if isinstance(batch, dict) else batch[0].tolist()


def train(folder: str, make: Callable[[], Any], stop_at: int | None = None) -> tuple[list[Any], Tensor]:
    """Fit on three batches an epoch; return them all, and a random number from behind the run."""
    seen = []

    def look(net: nn.Module, batch: Any) -> Tensor:
        seen.append(plain(batch))
        return net(torch.rand(1, 1)).mean()

    sheer.seed_everything(0)
    net = nn.Linear(1, 1)
    made = trainer(
        run_dir=folder, resume="auto", checkpoint=True, callbacks=[StopAt(stop_at)] if stop_at else [],
        overfit_batches=3, max_epochs=4,
    )  # fmt: skip
    try:
        made.fit(net, look, make(), optimizer=SGD(net.parameters(), lr=0.1))
    except SystemExit:
        assert stop_at
    return seen, torch.rand(1)


@pytest.mark.parametrize("kind", LOADERS)
def test_the_same_batches_are_seen_in_each_epoch_also_after_a_resume(kind: str) -> None:
    whole, drawn = train("whole", LOADERS[kind])
    assert whole == whole[:3] * 4 and len({str(batch) for batch in whole}) == 3
    for stop in (2, 3, 4, 9):
        before, _ = train(f"run{stop}", LOADERS[kind], stop)
        after, drawn_after = train(f"run{stop}", LOADERS[kind])
        assert before + after == whole, stop
        assert torch.equal(drawn_after, drawn), stop


def test_they_are_the_first_that_the_sampler_gives() -> None:
    sheer.seed_everything(0)
    loader = weighted(torch.Generator().manual_seed(3))
    by_hand = [plain(batch) for batch in itertools.islice(loader, 3)]
    assert train("run", lambda: weighted(torch.Generator().manual_seed(3)))[0] == by_hand * 4


def test_what_may_give_others_is_refused() -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    for given in (Stream(), generated(), StatefulDataLoader(dataset(), batch_size=16), DataLoader(Stream())):
        for loader in (given, {"a": given}):
            refused(
                sheer.DataError, f"a {type(given).__name__} may give others each time", "list(itertools.islice(loader, n))",
                loader=loader, overfit_batches=2,
            )  # fmt: skip
