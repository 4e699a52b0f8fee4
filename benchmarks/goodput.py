"""How much of an hour is training when the process is killed every minute: the digits in Sheer, Lightning and the HF Trainer.

    python benchmarks/goodput.py                               # five kills each, a minute apart: about 17 minutes on two cores
    python benchmarks/goodput.py --kills 10 --ways Sheer

Each is a process as a launcher starts it (its imports count), killed with SIGKILL after a minute and started again from its newest
checkpoint. The libraries take turns, minute by minute, so that what else the machine does meets all. All save as often, by default every
20 steps, about five seconds: near the best for a kill a minute (Young: the square root of twice the time of a save times that between two
failures). A step waits 0.2 s, as for a GPU, and the net has eight million weights besides, of which a step uses a corner: with AdamW
0.1 GB of state, and little to compute. After the last kill each is started once more: where that goes on is how many steps were of use.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from faults import WAYS, Net, Task
from torch import Tensor, nn

WAIT, PATIENCE = 0.2, 180.0


class SlowNet(Net):
    """Waits in each step, and has much to save."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ParameterList([nn.Parameter(torch.zeros(1024, 1024)) for _ in range(8)])

    def forward(self, x: Tensor, labels: Tensor, number: Tensor | None = None) -> dict[str, Tensor]:
        time.sleep(WAIT)
        return {"loss": super().forward(x, labels)["loss"] + sum(block[0, :4].sum() for block in self.blocks).square()}


def train(name: str, folder: Path, every: int) -> None:
    """Train, or go on, until this process is killed."""
    os.chdir(folder)
    torch.set_num_threads(1)
    WAYS[name][0](folder, Task(10**6, every, SlowNet, 1e-3, "link"))


def made(folder: Path) -> list[tuple[int, float]]:
    """Return the steps that were begun, in that order, and when."""
    file = folder / "samples.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("]\n")]
    return [(step, when) for step, _, when in records]


def started(name: str, folder: Path, every: int) -> tuple[subprocess.Popen[bytes], float]:
    """Start the process, and return it, and when."""
    with (folder / "output.txt").open("ab") as output:
        command = [sys.executable, __file__, "--one", name, str(folder), "--every", str(every)]
        return subprocess.Popen(command, stdout=output, stderr=output), time.time()


def first_step(name: str, folder: Path, every: int) -> int | None:
    """Start it once more, and return the step that it begins with; None: it cannot go on."""
    before = len(made(folder))
    process, began = started(name, folder, every)
    while len(made(folder)) == before and process.poll() is None and time.time() < began + PATIENCE:
        time.sleep(0.05)
    process.kill()
    process.wait()
    steps = made(folder)
    return steps[before][0] if len(steps) > before else None


class Way:
    """A run in one of the libraries, which is killed again and again."""

    def __init__(self, name: str, every: int) -> None:
        self.name, self.every, self.folder = name, every, Path(tempfile.mkdtemp())
        self.starts: list[float] = []  # seconds from each start to its first step
        self.between: list[float] = []  # seconds from step to step
        self.failed, self.seconds = 0, 0.0

    def live(self, seconds: float) -> None:
        """Start it, and kill it after so long; as by a launcher, one that ends by itself is started again."""
        until = time.time() + seconds
        self.seconds += seconds
        while time.time() < until:
            before = len(made(self.folder))
            process, began = started(self.name, self.folder, self.every)
            while process.poll() is None and time.time() < until:
                time.sleep(0.01)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            else:
                self.failed += 1
            times = [when for _, when in made(self.folder)[before:]]
            self.starts += [when - began for when in times[:1]]
            self.between += [later - when for when, later in itertools.pairwise(times)]

    def row(self) -> str:
        """Start it once more, and return what came of it as a row of a table."""
        count = len(made(self.folder))
        goes_on, a_step = first_step(self.name, self.folder, self.every), statistics.median(self.between)
        columns = [f"{statistics.median(self.starts):.1f}", f"{a_step:.3f}", str(self.failed)]
        if goes_on is None:
            last = (self.folder / "output.txt").read_text(errors="replace").strip().splitlines()[-1][:150]
            useful = [f"none, it cannot go on: {last}", "0", "0%"]
        else:
            steps = goes_on - 1
            useful = [str(steps), f"{steps / self.seconds * 3600:,.0f}", f"{steps * a_step / self.seconds:.0%}"]
        return f"| {' | '.join([self.name, str(count), *useful, *columns])} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--minute", type=float, default=60.0, help="seconds between two kills")
    parser.add_argument("--every", type=int, default=20, help="steps between two saves")
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"))
    args = parser.parse_args()
    if args.one:
        train(args.one[0], Path(args.one[1]), args.every)
        return
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}; killed every {args.minute:g} s, {args.kills} "
        f"times; saved every {args.every} steps\n"
    )
    print(
        "| | steps made | of use | of use per hour | of the time | start to first step, s | a step, s | starts that failed |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    for name in args.ways:  # so that none reads its files from a cold disk
        importlib.import_module({"Sheer": "sheer", "Lightning": "lightning", "HF Trainer": "transformers"}[name])
    ways = [Way(name, args.every) for name in args.ways]
    for _ in range(args.kills):
        for way in ways:
            way.live(args.minute)
    for way in ways:
        print(way.row(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
