"""The run that is killed: small, with all that has a state; and what it leaves, to be compared. All of it in the warm parent."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR

import sheer
from sheer.checkpoint.optimizer import optimizer_state
from sheer.distributed.tensors import whole
from tests.faults.killer import PLACES, Kill, Watched
from tests.faults.warm import Child, fork
from tests.ranks import free_port, place_of
from tests.task import loader, model, step

STEPS = 12


@dataclass(frozen=True)
class How:
    """How a run trains."""

    asynchronous: bool
    ranks: int = 1
    parallel: str = "auto"


HOWS = [How(asynchronous, n, p) for asynchronous in (False, True) for n, p in ((1, "auto"), (2, "ddp"), (2, "fsdp"))]


def train(folder: str, how: How) -> dict[str, Any]:
    """Train, or go on, to the end; return all that a run leaves in memory."""
    sheer.seed_everything(0)
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    scheduler = StepLR(optimizer, 3, gamma=0.9)
    trainer = sheer.Trainer(
        max_steps=STEPS,
        device="cpu",
        run_dir=folder,
        resume="auto",
        parallel=how.parallel,  # type: ignore[arg-type]
        log_every_n_steps=2,
        validate_every_n_steps=5,
        gradient_clip_val=1.0,
        monitor="val/loss",
        checkpoint=sheer.Checkpoint(every_n_steps=2, keep_last=2, keep_best=1, asynchronous=how.asynchronous),
        callbacks=[sheer.EMA(decay=0.9)],
        loggers=[sheer.CSV(), sheer.Console(live=False)],
    )
    trainer.fit(net, step, loader(16), loader(48, shuffle=False), optimizer=optimizer, scheduler=scheduler)
    return {
        "weights": {name: whole(value.detach()).clone() for name, value in net.state_dict().items()},
        "optimizer": _plain(optimizer_state(optimizer, net)),
        "scheduler": scheduler.state_dict(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return whole(value).clone()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def left_in(folder: str) -> dict[str, Any]:
    """Return what a run leaves on the disk that is to be the same: the logs, and which checkpoints there are."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader(Path(folder, "metrics.csv").read_text().splitlines()))
    for record in (*lines, *rows):
        record.pop("time", None)
    saves = Path(folder, "checkpoints")
    links = {link: saves.joinpath(link).readlink().name for link in ("last", "best")}
    return {"lines": lines, "rows": rows, "links": links, "saves": sorted(path.name for path in saves.glob("step-*"))}


def same(a: Any, b: Any, path: str = "") -> None:
    """Raise for any difference, bit for bit."""
    if isinstance(a, (Tensor, np.ndarray)):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{path}: {len(a)} and {len(b)}"
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            same(one, other, f"{path}/{index}")
    else:
        assert a == b, f"{path}: {a!r} and {b!r}"


def _rank(folder: str, how: How, kill: Kill | None) -> tuple[dict[str, Any], list[str]]:
    """Train in this process, which is killed where `kill` says so; return what is left in memory, and the calls that were made."""
    watched = Watched(folder, kill)
    watched.install()
    return train(folder, how), watched.seen


def start(folder: str, how: How, kills: Sequence[Kill | None], rank_function: Any = _rank) -> list[Child]:
    """Start the processes of a run, each of which kills itself where its own of `kills` says so."""
    port, ranks = free_port(), []
    for rank, kill in enumerate(kills):
        environment = place_of(rank, how.ranks, port) if how.ranks > 1 else {}
        ranks.append(fork(rank_function, folder, how, kill, environment=environment))
    return ranks


def end(ranks: Sequence[Child], timeout: float = 120.0, patience: float = 0.1) -> tuple[list[int | None], list[Any]]:
    """Wait for the processes of a run; return their exit codes, and what they returned.

    When one is killed or fails, the others are killed after some seconds, as by a launcher; their code is None then.
    """
    returned: list[Any] = [None] * len(ranks)
    last, ended = time.monotonic() + timeout, False
    while None in [rank.wait(0.0) for rank in ranks]:
        for place, rank in enumerate(ranks):
            returned[place] = rank.returned() or returned[place]
        if not ended and any(rank.code not in (None, 0) for rank in ranks):
            ended, last = True, min(last, time.monotonic() + patience)
        if time.monotonic() > last:
            break
        time.sleep(0.002)
    codes = [rank.code for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.wait(60.0)
    return codes, [rank.returned() or old for rank, old in zip(ranks, returned, strict=True)]


def in_a_process(function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> tuple[int | None, Any]:
    """Call a function in a forked process; return its exit code, None where it hung, and what it returned, or its error."""
    codes, returned = end([fork(function, *arguments)], timeout)
    return codes[0], returned[0]


@dataclass
class Whole:
    """A run that was never killed: what it leaves, which calls each rank made, and how long it took."""

    memory: list[Any]
    disk: dict[str, Any]
    calls: list[list[str]]
    seconds: float


@dataclass
class Tally:
    """What was done: kills, and checks that a run that went on is the one that was never killed."""

    kills: int = 0
    checks: int = 0
    labels: set[str] = field(default_factory=set)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.kills + other.kills, self.checks + other.checks, self.labels | other.labels)


_whole: dict[How, Whole] = {}


def whole_run(how: How) -> Whole:
    """Return the run that was never killed; it is made when it is first wanted."""
    if how not in _whole:
        with tempfile.TemporaryDirectory(dir=room()) as folder:
            os.chdir(folder)
            began = time.monotonic()
            codes, returned = end(start("run", how, [None] * how.ranks))
            assert codes == [0] * how.ranks, returned
            _whole[how] = Whole(
                [memory for memory, _ in returned],
                left_in("run"),
                [calls for _, calls in returned],
                time.monotonic() - began,
            )
    return _whole[how]


def room() -> str | None:
    """Return where folders are made: in memory where that can be, since to kill a process takes nothing from its page cache."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Chain:
    """A run that is killed again and again, each time somewhat later, and at the end compared with the one that was never killed."""

    def __init__(self, how: How, name: str) -> None:
        self.how, self.name, self.whole = how, name, whole_run(how)
        self.kills: list[str] = []
        self.folder = tempfile.mkdtemp(dir=room())

    def kill(self, rank: int, kill: Kill) -> bool:
        """Start the run, or let it go on, and kill a rank; False: it came to its end before."""
        os.chdir(self.folder)
        kills = [kill if rank == own else None for own in range(self.how.ranks)]
        return self._killed(start("run", self.how, kills), rank, str(kill))

    def kill_after(self, rank: int, seconds: float) -> bool:
        """The same after some seconds."""
        os.chdir(self.folder)
        ranks = start("run", self.how, [None] * self.how.ranks)
        ranks[rank].wait(seconds)
        ranks[rank].kill()
        return self._killed(ranks, rank, f"after {seconds:.3f} s")

    def _killed(self, ranks: list[Child], rank: int, what: str) -> bool:
        codes, returned = end(ranks)
        if codes[rank] == -signal.SIGKILL:
            self.kills.append(f"rank {rank} {what}")
            return True
        assert codes == [0] * len(codes), f"{self._story()}\nthen, to be killed {what}: {codes}\n{told(returned)}"
        return False

    def check(self, saves: bool = True) -> Tally:
        """Let the run come to its end, and compare; not which checkpoints stay, where it was stopped and has saved at other steps.

        Raises:
            AssertionError: it is not the run that was never killed.
        """
        os.chdir(self.folder)
        codes, returned = end(start("run", self.how, [None] * self.how.ranks))
        assert codes == [0] * len(codes), f"{self._story()}\nthen failed: {codes}\n{told(returned)}"
        try:
            same([memory for memory, _ in returned], self.whole.memory)
            left = left_in("run")
            # A run that is killed behind its last commit has deleted nothing after it, and has nothing to do when it goes on.
            left["saves"] = [name for name in left["saves"] if name in self.whole.disk["saves"]]
            names = ("lines", "rows", "links", "saves") if saves else ("lines", "rows")
            same({name: left[name] for name in names}, {name: self.whole.disk[name] for name in names})
        except AssertionError as error:
            raise AssertionError(f"{self._story()}\nthen differs: {error}; see {self.folder}") from error
        os.chdir("/")
        shutil.rmtree(self.folder)
        return Tally(len(self.kills), 1)

    def _story(self) -> str:
        return "\n  ".join([f"{self.name}, {self.how}; killed", *self.kills])


def told(returned: Sequence[Any]) -> str:
    """Return the errors among what processes returned."""
    return "\n".join(text for text in returned if isinstance(text, str))


def at_every_label(how: How, seed: int, everywhere: bool = True, each: int = 6) -> Tally:
    """Kill at every kind of call that a save makes, on every rank: before, halfway and behind, or at one of these that is drawn.

    A run is killed up to `each` times before it may come to its end.
    """
    labels = sorted(
        {
            (rank, call)
            for rank, calls in enumerate(whole_run(how).calls)
            for call in calls
            if how.ranks == 1 or not re.search(r"metrics\.csv|run\.json|write_text state", call)
        }
    )
    draw = random.Random(seed)
    left = [
        (rank, call, place)
        for rank, call in labels
        for place in (PLACES if everywhere else draw.choices(PLACES))
        if place != "half" or is_halved(call) or not everywhere
    ]
    draw.shuffle(left)
    tally, fresh = Tally(labels={call for _, call in labels}), 0
    while left:
        chain, missed = Chain(how, f"at_every_label, seed {seed}"), 0
        while left and len(chain.kills) < each and missed < 2:
            rank, call, place = left.pop()
            often = whole_run(how).calls[rank].count(call)
            # Not always the first: then there is something to lose.
            if chain.kill(rank, Kill(call, place, draw.randrange(min(2, often)))):
                fresh = 0
                continue
            left.insert(0, (rank, call, place))
            missed, fresh = 2, fresh + 1
            assert fresh < 20 * len(labels), f"{left} were not reached"
        tally += chain.check()
    return tally


def is_halved(called: str) -> bool:
    """Whether half of a call is something else than none or all of it."""
    call, name = called.split(" ", 1)
    return call in ("save_file", "write_text", "rmtree") or (call == "fsync" and name.endswith(".tmp"))


def at_random(how: How, seed: int, kills: int) -> Tally:
    """Kill as many times at random instants and calls, on random ranks, about five times in each run."""
    draw, tally, run = random.Random(seed), Tally(), whole_run(how)
    while tally.kills < kills:
        chain = Chain(how, f"at_random, seed {seed}")
        for _ in range(draw.randint(3, 7)):
            rank = draw.randrange(how.ranks)
            if draw.random() < 0.5:
                killed = chain.kill_after(rank, draw.uniform(0.0, run.seconds))
            else:
                at = draw.randrange(len(run.calls[rank]) // 3)
                killed = chain.kill(rank, Kill("", draw.choice(PLACES), at))
            if not killed or tally.kills + len(chain.kills) == kills:
                break
        tally += chain.check()
    return tally
