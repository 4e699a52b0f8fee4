"""Every row of the matrix, saved in the middle of an epoch and gone on with by the other: `make both-ways`. Half an hour on two cores.

The tests do this for the settings and loaders that matter most (`test_checkpoints_both_ways.py`).
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

from tests.eject.scripts import OFF, ON, ROWS
from tests.eject.test_checkpoints_both_ways import endings

FIRST, LAST = 14, 20  # steps; an epoch has six
NOT_ALIKE = (
    *("wandb", "mlflow", "watched", "time"),  # servers, and what is measured of the machine
    *("compile", "all at once", "from settings", "main", "fast"),  # settings that are written otherwise
    "scheduler",  # made for so many steps, and no more
)


def saved(text: str) -> str:
    """Return the script of a row so that it ends at step 20, saves, and goes on."""
    text = text.replace(OFF, ON)
    if "max_epochs" in text:
        text = re.sub(r"max_epochs=(\d+|config\.epochs)", f"max_steps={LAST}", re.sub(r"max_steps=\d+, ", "", text))
    text = re.sub(r"max_steps=\d+", f"max_steps={LAST}", text)
    return text if "resume=" in text else text.replace("run_dir='runs/here'", "run_dir='runs/here', resume='auto'")


def main(*names: str) -> int:
    """Try all rows, or those that are named; return how many failed."""
    failed = 0
    for name in names or [name for name in ROWS if name not in NOT_ALIKE]:
        with tempfile.TemporaryDirectory() as folder:
            ends = endings(saved(ROWS[name]), Path(folder), FIRST, LAST)
        wrong = [who for who, end in ends.items() if json.dumps(end) != json.dumps(ends["library, library"])]
        failed += bool(wrong)
        print(f"{name}: {'equal' if not wrong else 'DIFFERS: ' + ', '.join(wrong)}", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
