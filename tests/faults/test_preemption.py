"""A machine that is taken back: a signal at any instant, a second one, a limit of time; saved, left with 85, and gone on with bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.optim import SGD

import sheer
from tests.faults.runs import Chain, How, Tally, end, start, told, whole_run
from tests.faults.warm import Warm
from tests.task import assert_same, loader, model, step, trainer

pytestmark = pytest.mark.xdist_group("kills")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def stop_again_and_again(how: How, seed: int, stops: int) -> tuple[int, Tally]:
    """Stop runs by signals to one rank, at random instants behind their first step; return how many left with 85, and the checks."""
    draw, stopped, tally = random.Random(seed), 0, Tally()
    whole_run(how)
    while stopped < stops:
        chain = Chain(how, f"stop_again_and_again, seed {seed}")
        for number in draw.sample(SIGNALS, 3):
            os.chdir(chain.folder)
            before = lines()
            ranks = start("run", how, [None] * how.ranks)
            while lines() == before and None in [rank.wait(0.0) for rank in ranks]:
                time.sleep(0.001)
            time.sleep(draw.uniform(0.0, 0.05))
            rank = draw.choice(ranks)
            rank.kill(number)
            codes, returned = end(ranks, patience=60.0)
            says = Path("stderr.txt").read_text()
            is_stopped = f"stopped by {number.name} after" in says
            left = [85] if how.ranks == 1 else [0] * how.ranks  # what starts ranks takes anything else for a failure
            # One that comes behind the end of `fit` does what it does in any script.
            assert codes == left if is_stopped else None not in codes, (codes, told(returned))
            stopped += is_stopped
        tally += chain.check(saves=False)
    return stopped, tally


def lines() -> int:
    """Return how many lines the log has."""
    log = Path("run/metrics.jsonl")
    return log.read_text().count("\n") if log.exists() else 0


@pytest.mark.parametrize("how", [How(True), How(False), How(True, 2, "ddp")], ids=str)
def test_a_signal_at_any_instant(how: How, warm: Warm) -> None:
    stopped, tally = warm.call(stop_again_and_again, how, 5, 6 if how.ranks == 1 else 3)
    assert stopped >= 3 and tally.checks >= 1


def test_a_validation_that_takes_long_is_left_at_its_next_batch() -> None:
    """So that a process is gone within the seconds that a cluster gives it."""
    evaluated = []

    def evaluate(net: nn.Module, batch: Any) -> Any:
        evaluated.append(1)
        if len(evaluated) == 4:  # the first was the trial
            signal.raise_signal(signal.SIGTERM)
        return step(net, batch)

    net = model()
    with pytest.raises(SystemExit) as left:
        trainer(run_dir="run", checkpoint=True).fit(
            net, step, loader(), loader(1, shuffle=False), eval_step=evaluate, optimizer=SGD(net.parameters(), lr=0.1)
        )
    assert left.value.code == 85 and len(evaluated) == 4


def test_a_validation_is_run_to_its_end_where_nothing_is_saved() -> None:
    evaluated = []

    def evaluate(net: nn.Module, batch: Any) -> Any:
        evaluated.append(1)
        if len(evaluated) == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(net, batch)

    net = model()
    with pytest.raises(SystemExit):
        trainer(run_dir="run").fit(
            net, step, loader(), loader(10, shuffle=False), eval_step=evaluate, optimizer=SGD(net.parameters(), lr=0.1)
        )
    assert len(evaluated) == 11


def limited(folder: str, **durations: Any) -> tuple[dict[str, Tensor], Any]:
    def slow(net: nn.Module, batch: Any) -> Any:
        time.sleep(0.01)
        return step(net, batch)

    sheer.seed_everything(0)
    net = model()
    made = trainer(run_dir=folder, checkpoint=True, resume="auto", **durations)
    result = made.fit(net, slow, loader(), optimizer=SGD(net.parameters(), lr=0.1))
    return dict(net.state_dict()), result


def test_a_limit_of_time_saves_and_the_run_goes_on_when_it_is_given_more() -> None:
    whole, _ = limited("whole", max_steps=30)
    _, stopped = limited("run", max_steps=30, max_time=0.08)
    assert stopped.stopped_by == "max_time" and 1 <= stopped.step < 30
    assert stopped.last == Path(f"run/checkpoints/step-{stopped.step:08d}")
    _, again = limited("run", max_steps=30, max_time=0.08)
    assert (again.step, again.stopped_by) == (stopped.step, "max_time"), "earlier sessions count"
    weights, done = limited("run", max_steps=30, max_time=1000)
    assert (done.step, done.stopped_by) == (30, "max_steps")
    assert_same(weights, whole)
