"""How much of an hour is training when the process is killed every minute: the digits in Sheer, Lightning and the HF Trainer.

    python benchmarks/goodput.py                               # five kills each, a minute apart: about 17 minutes on two cores
    python benchmarks/goodput.py --kills 10 --ways Sheer

Each is a process as a launcher starts it (its imports count), killed with SIGKILL once a minute and started again at once, from its
newest checkpoint. All save as often, by default every 20 steps, about five seconds: near the best for a kill a minute (Young: the square
root of twice the time of a save times that between two failures). A step waits 0.2 s, as for a GPU, and the net has eight million weights
besides, of which a step uses a corner: with AdamW 0.1 GB of state, and little to compute. After the last kill it is started once more:
where that goes on is how many steps were of use.
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


def measured(name: str, kills: int, minute: float, every: int) -> str:
    """Kill it so often, and return what came of it as a row of a table."""
    folder = Path(tempfile.mkdtemp())
    starts, failed, began = list[float](), 0, time.time()
    for number in range(1, kills + 1):
        until = began + number * minute
        while time.time() < until:  # as a launcher: one that ends by itself is started again
            before = len(made(folder))
            process, start = started(name, folder, every)
            while process.poll() is None and time.time() < until:
                time.sleep(0.01)
            failed += process.poll() is not None
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            steps = made(folder)
            if len(steps) > before:
                starts.append(steps[before][1] - start)
    steps, seconds = made(folder), kills * minute
    goes_on = first_step(name, folder, every)
    between = statistics.median(later - when for (_, when), (_, later) in itertools.pairwise(steps))
    if goes_on is None:
        last = (folder / "output.txt").read_text(errors="replace").strip().splitlines()[-1][:150]
        return f"| {name} | {len(steps)} | cannot go on: {last} | | | {statistics.median(starts):.1f} | {between:.3f} | {failed} |"
    useful = goes_on - 1
    share = useful * between / seconds
    return (
        f"| {name} | {len(steps)} | {useful} | {useful / seconds * 3600:,.0f} | {share:.0%} | {statistics.median(starts):.1f} | {between:.3f} | "
        f"{failed} |"
    )


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
    for name in args.ways:
        module = {"Sheer": "sheer", "Lightning": "lightning", "HF Trainer": "transformers"}[name]
        importlib.import_module(module)  # so that none reads its files from a cold disk
        print(measured(name, args.kills, args.minute, args.every), flush=True)


if __name__ == "__main__":
    sys.exit(main())
