"""What a resume costs: no sample that was used is read again, and nothing that grows with the position is done."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from sheer.data.choose import make_source
from sheer.data.order import GlobalSampler
from tests.task import model, step, trainer
from tests.test_resume import CountedReads, run

SAMPLES = 100_000_000


class Endless(Dataset[Any]):
    """A hundred million samples, made when they are asked for; it notes which were."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return torch.full((6,), float(index) / SAMPLES), torch.zeros(1)


def work(position: int, shuffle: bool, batches: int = 3) -> tuple[int, list[int]]:
    """Return the calls of Python functions that it takes to get some batches from a position on, and the samples read."""
    data = Endless()
    source = make_source(
        DataLoader(data, batch_size=10, shuffle=shuffle),
        seed=1, device=torch.device("cpu"), resume_by_skipping=False, same_epoch=False, ranks=None,
    )  # fmt: skip
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        taken = source.epoch(0, position // 10)
        for _ in range(batches):
            next(taken)
    finally:
        sys.setprofile(None)
    return calls, data.read


@pytest.mark.parametrize("shuffle", [True, False])
def test_what_is_done_does_not_grow_with_the_position(shuffle: bool) -> None:
    work(0, shuffle)  # what is imported and cached at the first time
    (near, near_read), (far, far_read) = work(1000, shuffle), work(10_000_000, shuffle)
    assert len(near_read) == len(far_read) == 30, "only the samples of these batches"
    sampler = GlobalSampler(range(SAMPLES), shuffle=shuffle, seed=1)
    sampler.set_epoch(0, 10_000_000)
    order = iter(sampler)
    assert far_read == [next(order) for _ in range(30)]
    assert abs(far - near) <= 100 and far < 5000, (near, far)  # a Feistel network is walked a few times more, or less


def test_no_sample_that_was_used_is_read_again_in_workers_or_by_a_later_epoch() -> None:
    for stop, read in ((5, 20), (7, 0), (9, 68)):  # in epochs of 7 steps and 100 samples
        made: list[CountedReads] = []

        def make(made: list[CountedReads] = made) -> DataLoader[Any]:
            made.append(CountedReads())
            return DataLoader(made[-1], batch_size=16, shuffle=True)

        folder = f"run-{stop}"
        run(folder, stop_at=stop, make_loader=make, max_epochs=2)
        run(folder, make_loader=make, max_epochs=2)
        assert made[0].reads + made[1].reads == 200, "each sample once an epoch"
        assert made[1].reads == (read + 100 if stop <= 7 else read)


def test_a_run_over_a_hundred_million_samples_goes_on_where_it_was() -> None:
    data = Endless()
    net = model()
    made = trainer(max_steps=2, checkpoint=True, run_dir="run", max_epochs=None)
    made.fit(net, step, DataLoader(data, 10, shuffle=True), optimizer=torch.optim.SGD(net.parameters(), lr=0.01))
    assert len(data.read) == 20
    again = Endless()
    made = trainer(max_steps=4, checkpoint=True, run_dir="run", max_epochs=None, resume="auto")
    made.fit(net, step, DataLoader(again, 10, shuffle=True), optimizer=torch.optim.SGD(net.parameters(), lr=0.01))
    assert len(again.read) == 20 and not {*again.read} & {*data.read}
