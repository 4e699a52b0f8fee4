"""Runs the scripts of docs/tasks/ of one framework in this process, each twice, and tells as JSON what they did; see test_tasks.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

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


if __name__ == "__main__":
    scripts = [script for name in sys.argv[1:] for script in sorted(TASKS.glob(f"*/with_{name}.py"))]
    report = {f"{s.parent.name}-{s.stem.removeprefix('with_')}": [run(s, 1), run(s, 2)] for s in scripts}
    Path("report.json").write_text(json.dumps(report))
