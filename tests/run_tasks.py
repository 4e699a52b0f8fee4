"""Runs the scripts of docs/tasks/ of some frameworks in this process, each twice, and tells as JSON what they did; see test_tasks.py.

On several ranks those that are for several, where a task has one, and each once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

from torch import distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

TASKS = Path(__file__).parents[1] / "docs" / "tasks"


def run(script: Path, epochs: int) -> dict[str, object]:
    """Run a script up to so many epochs, and return the last line it printed and how many updates were made."""
    updates = 0

    def count(*_: object) -> None:
        nonlocal updates
        updates += 1

    os.environ["TASK_EPOCHS"] = str(epochs)
    sys.modules.pop("common", None)
    sys.path[0] = str(script.parent)
    handle, printed = register_optimizer_step_post_hook(count), io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(script), run_name="__main__")
    handle.remove()
    return {"printed": printed.getvalue().splitlines()[-1], "updates": updates}


def on_ranks(script: Path) -> Path:
    """Return the script that does the same on four ranks, where it is another."""
    other = script.with_name(f"ranks_{script.name}")
    return other if other.exists() else script


if __name__ == "__main__":
    scripts = [script for name in sys.argv[1:] for script in sorted(TASKS.glob(f"*/with_{name}.py"))]
    rank, several = int(os.environ.get("RANK", "0")), "RANK" in os.environ
    end_group = dist.destroy_process_group
    shares_a_group = several and "pytorch" in sys.argv  # whose scripts end it, and these processes can make only one
    if shares_a_group:
        dist.init_process_group()
        dist.init_process_group = dist.destroy_process_group = dist.barrier  # type: ignore[assignment]
    report = {
        f"{script.parent.name}-{script.stem.removeprefix('with_')}": [run(on_ranks(script), 1)]
        if several
        else [run(script, 1), run(script, 2)]
        for script in scripts
    }
    if rank == 0:
        Path("report.json").write_text(json.dumps(report))
    if shares_a_group:
        end_group()  # its threads must not outlive it: a process that ends with them is aborted now and then
