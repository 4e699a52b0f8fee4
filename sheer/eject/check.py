"""Whether an ejected script does what its original does: both run, in processes of their own, and compared bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheer.eject.program import Refusal

WATCH = Path(__file__).with_name("watch.py")
MEASURED = ("time/", "throughput/", "host/", "device/")
"""What Timer, Throughput and DeviceStats measure of the machine: no two runs agree on it, so that it was logged is compared."""


@dataclass(frozen=True)
class Compared:
    """What two runs had in common.

    Attributes:
        updates: how many updates of optimizers were compared.
        difference: the first difference, in words; None: there was none.
        logged: how many lines of metrics were compared.
    """

    updates: int
    difference: str | None
    logged: int = 0


def check(
    original: Path, ejected: Path, arguments: Sequence[str], updates: int, blocked: str = "sheer", ranks: int = 1
) -> Compared:
    """Run both scripts for so many updates, the second where the library cannot be imported, and compare.

    Args:
        blocked: the package that the second must do without; "-" for none.
        ranks: how many processes train together; each is compared with its like.

    Raises:
        Refusal: one of them failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        reports, logs = [], []
        for name, script, without in (("original", original, "-"), ("ejected", ejected, blocked)):
            run_dir = Path(folder) / name
            reports.append(_run(Path(folder) / f"{name}.json", updates, run_dir, without, script, arguments, ranks))
            logs.append(_logged(run_dir / "metrics.jsonl"))
    if blocked == "-":  # a loop of one's own validates before a step is logged, `fit` behind it
        for lines in logs:
            lines.sort(key=lambda line: (line["step"], sorted(line)))
    found = [compared(one, other, logs[0], logs[1]) for one, other in zip(*reports, strict=True)]
    return next((each for each in found if each.difference is not None), found[0])


def _run(
    report: Path, updates: int, run_dir: Path, blocked: str, script: Path, arguments: Sequence[str], ranks: int
) -> list[dict[str, Any]]:
    """Run a script, and return what each rank reports."""
    command = [str(WATCH), str(report), str(updates), str(run_dir), blocked, str(script), *arguments]
    if ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env={**os.environ})
    reports = [report, *(report.with_name(f"{report.name}.{rank}") for rank in range(1, ranks))]
    if not all(each.exists() for each in reports):
        raise Refusal(f"{script} failed while it was compared:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return [json.loads(each.read_text()) for each in reports]


def _logged(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [
        {name: "measured" if name.startswith(MEASURED) else value for name, value in line.items() if name != "time"}
        for line in lines
    ]


def compared(one: dict[str, Any], other: dict[str, Any], logged: list[Any], logged_too: list[Any]) -> Compared:
    """Compare the reports and the metrics of two runs."""
    count = min(len(one["updates"]), len(other["updates"]))
    for number, (first, second) in enumerate(zip(one["updates"], other["updates"], strict=False), start=1):
        differing = [name for name in first if first[name] != second[name]]
        if differing:
            return Compared(number, f"after update {number} these differ: {', '.join(differing)}")
    if len(one["updates"]) != len(other["updates"]) or one["ended"] != other["ended"]:
        return Compared(count, f"one made {len(one['updates'])} updates, the other {len(other['updates'])}")
    for line, (before, after) in enumerate(zip(logged, logged_too, strict=False), start=1):
        if json.dumps(before) != json.dumps(after):
            return Compared(count, f"line {line} of metrics.jsonl was {before}, and is {after}")
    if len(logged) != len(logged_too):
        return Compared(count, f"metrics.jsonl had {len(logged)} lines, and has {len(logged_too)}")
    return Compared(count, None, len(logged))
