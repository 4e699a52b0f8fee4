"""A run that goes back and is killed, before, in and behind that, goes on and ends as the one that was not killed."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import sheer
import sheer.loop
from tests.distributed.features import WAYS
from tests.distributed.test_rollback_on_ranks import trained
from tests.faults.killer import PLACES, Kill, Watched, die
from tests.faults.runs import How, end, in_a_process, room, same, start
from tests.faults.warm import Warm
from tests.rollback import Step, run
from tests.task import loader

pytestmark = pytest.mark.xdist_group("kills")

NANS, SPIKE = [(0, 2), (1, 3)], [(2, 2)]


class Steps(Step):
    """NaN on two batches, a spike on a third."""

    def __init__(self) -> None:
        super().__init__(NANS)
        self.spiking = Step(SPIKE, factor=1e4)

    def __call__(self, net: nn.Module, batch: Any, step: int) -> Any:
        return (
            super().__call__(net, batch, step) if float(batch[0].sum()) in self.keys else self.spiking(net, batch, step)
        )


class DiesAt:
    """Kills this process in the backward pass of a step, the n-th time that it is made."""

    def __init__(self, step: int, time: int) -> None:
        self.step, self.left = step, time

    def on_gradients(self, step: int, model: nn.Module) -> None:
        self.left -= step == self.step
        if step == self.step and self.left == 0:
            die()


def watching(folder: str, kill: Kill | None) -> Watched:
    """Note what changes what is in the folder, and `back` where the run goes back; kill at the n-th of these."""
    watched, go_back = Watched(folder, kill), sheer.loop.go_back
    watched.install()

    def noted(*given: Any) -> None:
        watched.seen.append("back")
        go_back(*given)
        if kill is not None and kill.label == "back" and watched.seen.count("back") == kill.number + 1:
            die()

    sheer.loop.go_back = noted
    return watched


def train(
    folder: str, kill: Kill | None = None, dies: tuple[int, int] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Train, or go on; return all that is left, and the calls that changed what is on the disk, `back` where the run went back."""
    watched = watching(folder, kill)
    left = run(
        folder, Steps(), rollback=sheer.Rollback(spike=20.0), val=loader(32, shuffle=False), monitor="val/loss", validate_first=True,
        callbacks=lambda: [sheer.EMA(0.9), *([DiesAt(*dies)] if dies is not None else [])],
    )  # fmt: skip
    return left, watched.seen


def compare() -> list[str]:
    """Kill at calls behind each time that the run goes back, and in steps around them; return what was wrong."""
    wrong = []
    with tempfile.TemporaryDirectory(dir=room()) as folder:
        os.chdir(folder)
        code, told = in_a_process(train, "whole")
        if code != 0:
            return [f"not killed at all: {code} {told}"]
        whole, calls = told
        backs = [at - number for number, at in enumerate(at for at, call in enumerate(calls) if call == "back")]
        if len(backs) != 3:
            return [f"it went back {len(backs)} times"]
        kills: list[tuple[Kill | None, Any]] = [
            (Kill("back", "after"), None),
            (None, (2, 1)),
            (None, (3, 2)),
            (None, (10, 2)),
            (None, (12, 1)),
        ]
        for number, at in enumerate(backs):  # the save that follows makes some 20 calls
            kills += [(Kill("", PLACES[(number + ahead) % 3], at + ahead), None) for ahead in range(number, 24, 6)]
        for number, (kill, dies) in enumerate(kills):
            code, _ = in_a_process(train, f"run-{number}", kill, dies)
            if code != -signal.SIGKILL:
                wrong.append(f"{kill or dies}: it ended with {code}")
            code, left = in_a_process(train, f"run-{number}")
            try:
                assert code == 0, f"{code}: {left}"
                same(left[0], whole)
            except AssertionError as error:
                wrong.append(f"{kill or dies}: {error}; {Path('stderr.txt').read_text()[-500:]}")
        os.chdir("/")
    return wrong


def on_a_rank(folder: str, how: How, kill: Kill | None) -> tuple[dict[str, Any], list[str]]:
    """Train as one of the ranks, of which one has the sample that makes the loss NaN; return what is left, and the calls."""
    watched = watching(folder, kill)
    left = trained(WAYS[how.parallel][1], folder, False, sheer.Rollback(max_times=9))
    return left, watched.seen


def compare_on_ranks(way: str, seed: int, number: int) -> list[str]:
    """Kill one of the ranks, each time another way, behind going back or at a call soon after; return what was wrong."""
    how, wrong, draw = How(True, WAYS[way][0], way), [], random.Random(seed)
    with tempfile.TemporaryDirectory(dir=room()) as folder:
        os.chdir(folder)
        codes, returned = end(start("whole", how, [None] * how.ranks, on_a_rank))
        if codes != [0] * how.ranks:
            return [f"not killed at all: {codes} {returned}"]
        for at in range(number):
            rank = at % how.ranks
            calls = returned[rank][1]
            backs = [place for place, call in enumerate(calls) if call == "back"]
            which = draw.randrange(len(backs))
            behind = len(calls) - backs[which]
            ahead = min(draw.randrange(8), behind - 1)
            kill = (
                Kill("back", "after", which)
                if at < how.ranks
                else Kill("", draw.choice(PLACES), backs[which] - which + ahead)
            )
            story = f"{way}, seed {seed}, rank {rank}: {kill}"
            killed, _ = end(start(f"run-{at}", how, [kill if r == rank else None for r in range(how.ranks)], on_a_rank))
            if killed[rank] != -signal.SIGKILL:
                wrong.append(f"{story}: it ended with {killed}")
            codes, left = end(start(f"run-{at}", how, [None] * how.ranks, on_a_rank))
            try:
                assert codes == [0] * how.ranks, f"{codes}: {left}"
                for (memory, _), (expected, _) in zip(left, returned, strict=True):
                    same(memory, expected)
            except AssertionError as error:
                wrong.append(f"{story}: {error}; {Path('stderr.txt').read_text()[-500:]}")
        os.chdir("/")
    return wrong


def test_a_run_that_goes_back_is_killed_around_it(warm: Warm) -> None:
    assert warm.call(compare) == []


@pytest.mark.parametrize(("way", "kills"), [("DDP", 4), ("FSDP2", 4), ("TP", 2), ("PP", 4), ("HSDP", 2)])
def test_one_of_the_ranks_is_killed_around_it(warm: Warm, way: str, kills: int) -> None:
    assert warm.call(compare_on_ranks, way, 1, kills) == []
