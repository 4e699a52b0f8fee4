"""A dict of loaders: the longest sets the epoch, a shorter one makes pass after pass, and a resume goes on in the middle of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import sheer
from sheer.data import GlobalSampler
from sheer.data.order import mix_seed
from tests.mistakes.common import refused
from tests.task import loader, trainer
from tests.test_resume import StopAt

LONG, SHORT = 7, 4  # batches


def numbers(count: int, first: int = 0) -> TensorDataset:
    return TensorDataset(torch.arange(first, first + count))


class Sized:
    """Batches with a length that are no list; each pass is drawn, at its start."""

    def __len__(self) -> int:
        return SHORT

    def __iter__(self) -> Iterator[Any]:
        for number in torch.randperm(SHORT).tolist():
            yield [torch.tensor([number])]


class WithState:
    """Batches with a length and a state, which numbers its passes."""

    def __init__(self) -> None:
        self.passed, self.at = 0, 0

    def __len__(self) -> int:
        return SHORT

    def __iter__(self) -> Iterator[Any]:
        while self.at < SHORT:
            self.at += 1
            yield [torch.tensor([100 * self.passed + self.at])]
        self.passed, self.at = self.passed + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passed, self.at = state["passed"], state["at"]


def torchdatas(**options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(numbers(SHORT), batch_size=1, **options)


def own_order(**options: Any) -> DataLoader[Any]:
    return DataLoader(numbers(SHORT), batch_size=1, sampler=SubsetRandomSampler(range(SHORT)), **options)


SHORTER: dict[str, Callable[[], Any]] = {
    "in its default order": lambda: DataLoader(numbers(SHORT), batch_size=1, shuffle=True),
    "in workers that persist": lambda: DataLoader(
        numbers(SHORT), batch_size=1, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "with a sampler": own_order,
    "with a sampler, in a worker": lambda: own_order(num_workers=1),
    "with a sampler, in workers that persist": lambda: own_order(num_workers=1, persistent_workers=True),
    "a list": lambda: [[torch.tensor([number])] for number in range(SHORT)],
    "an iterable": Sized,
    "with a state": WithState,
    "torchdata's": torchdatas,
    "torchdata's, shuffled": lambda: torchdatas(shuffle=True),
}


def train(
    folder: str, make_shorter: Callable[[], Any], stop_at: int | None = None, **settings: Any
) -> tuple[list[Any], Tensor]:
    """Fit in a folder; return the batches of each step, and a random number from behind the run."""
    seen = []
    net = nn.Linear(1, 1)

    def look(net: nn.Module, batch: Any) -> Tensor:
        seen.append((batch["a"][0].tolist(), batch["b"][0].tolist()))
        return net(torch.rand(1, 1)).mean()  # draws in between, as dropout does

    sheer.seed_everything(0)
    made = trainer(
        run_dir=folder, resume="auto", checkpoint=True, callbacks=[StopAt(stop_at)] if stop_at else [], **settings
    )
    loaders = {"a": DataLoader(numbers(LONG, 1000), batch_size=1, shuffle=True), "b": make_shorter()}
    try:
        made.fit(net, look, loaders, optimizer=SGD(net.parameters(), lr=0.1), resume_by_skipping=True)
    except SystemExit:
        assert stop_at is not None
    return seen, torch.rand(1)


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("kind", ["in its default order", "in workers that persist", "a list", "with a state"])
def test_a_shorter_one_goes_on_where_it_is_when_the_longest_starts_anew(kind: str, limit: int | None) -> None:
    def passes() -> Iterator[Any]:
        sampler = GlobalSampler(range(SHORT), seed=mix_seed(0, 1))
        default = DataLoader(numbers(SHORT), batch_size=1, sampler=sampler)
        shorter = default if kind.startswith("in ") else SHORTER[kind]()
        for number in range(10):
            sampler.set_epoch(number)
            yield from shorter

    sampler = GlobalSampler(range(LONG), seed=0)
    longest, shorter, by_hand = DataLoader(numbers(LONG, 1000), batch_size=1, sampler=sampler), passes(), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for at, a in enumerate(longest):
            if at != limit:
                by_hand.append((a[0].tolist(), next(shorter)[0].tolist()))
            else:
                break
    seen, _ = train("run", SHORTER[kind], limit_train_batches=limit)
    assert seen == by_hand


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("kind", SHORTER)
def test_a_run_that_is_resumed_goes_on_in_the_middle_of_a_pass(kind: str, limit: int | None) -> None:
    whole, drawn = train("whole", SHORTER[kind], limit_train_batches=limit)
    for stop in (2, 3, 4, 6, 7, 8):
        before, _ = train(f"run{stop}", SHORTER[kind], stop_at=stop, limit_train_batches=limit)
        after, drawn_after = train(f"run{stop}", SHORTER[kind], limit_train_batches=limit)
        assert before + after == whole, stop
        if "torchdata" not in kind:
            assert torch.equal(drawn_after, drawn), stop


def test_each_pass_is_over_all_batches() -> None:
    seen, _ = train("run", own_order)
    passes = [[b for _, (b,) in seen[at : at + SHORT]] for at in range(0, 20, SHORT)]
    assert [sorted(one) for one in passes] == [[0, 1, 2, 3]] * 5
    assert len({tuple(one) for one in passes}) > 1


def test_one_that_cannot_be_entered_in_the_middle_is_refused_on_resume() -> None:
    net = nn.Linear(1, 1)
    how: dict[str, Any] = {"run_dir": "run", "resume": "auto", "checkpoint": True}

    def step(net: nn.Module, batch: Any) -> Tensor:
        return net(torch.ones(1, 1)).mean()

    for stop in (7, None):
        made = trainer(callbacks=[StopAt(stop)] if stop else [], **how)
        with pytest.raises(SystemExit if stop else sheer.DataError, match=None if stop else "resume_by_skipping=True"):
            made.fit(net, step, {"a": loader(16), "b": Sized()}, optimizer=SGD(net.parameters(), lr=0.1))


def test_a_length_that_says_too_much_is_an_error_that_names_the_loader() -> None:
    class Less(Sized):
        def __len__(self) -> int:
            return SHORT + 1

    def step(net: nn.Module, batch: Any) -> Tensor:
        return net(batch["a"][0]).mean()

    refused(
        sheer.DataError, "The loader 'b' ended after 4 of 5 batches in its pass 1", "__len__ is wrong",
        step=step, loader={"a": loader(16), "b": Less()}, updates=4,
    )  # fmt: skip


def test_a_run_with_other_names_is_refused() -> None:
    def step(net: nn.Module, batch: Any) -> Tensor:
        return net(next(iter(batch.values()))[0]).mean()

    def fit(name: str, **settings: Any) -> None:
        net = nn.Linear(6, 1)
        trainer(run_dir="run", resume="auto", checkpoint=True, **settings).fit(
            net, step, {name: loader(16)}, optimizer=SGD(net.parameters(), lr=0.1)
        )

    fit("a", max_steps=3)
    with pytest.raises(sheer.DataError, match="loaders named a, and these are named b"):
        fit("b", max_steps=5)
