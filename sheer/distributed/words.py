"""What a rank leaves for the launcher that started it: that it runs, that it saved and left, which error ended it.

Each is a small file in a folder of the rank's own, whose place the launcher gives in the environment.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from sheer.distributed.world import world
from sheer.signals import EXIT_STATUS

FOLDER_OF_WORDS = "SHEER_RANK_FOLDER"
RUNS, LEFT, ERROR = "runs.json", "left.json", "error.json"


def launcher_folder() -> Path | None:
    """Return where to leave word for the launcher; None for a process that `sheer run` has not started as a rank."""
    folder = os.environ.get(FOLDER_OF_WORDS)
    return Path(folder) if folder else None


def leave_word(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write a file that is seen whole or not at all."""
    draft = folder / f".{name}.{os.getpid()}"
    draft.write_text(json.dumps(content))
    draft.replace(folder / name)


def departure_status() -> int:
    """Return the status with which a process that saved and left is to end, and leave word of it.

    Several ranks end with 0: what started them takes anything else for a failure, and starts them again. `sheer run` reads the
    word that they leave, and ends with 85 itself.
    """
    folder = launcher_folder()
    if folder is not None:
        leave_word(folder, LEFT, {"time": time.time()})
    return EXIT_STATUS if folder is None and world().world_size == 1 else 0


def report_error(text: str, summary: str, echo: bool) -> bool:
    """Hand the launcher the error that ends this rank, for it to be shown once. Returns False where there is no launcher.

    Args:
        text: all that is to be shown, the traceback above all.
        summary: the error in one line.
        echo: whether it only follows from the end of another rank. Those are not shown if there is any other.
    """
    folder = launcher_folder()
    if folder is None:
        return False
    if not (folder / ERROR).exists():
        now = time.time()  # in the form of torch's agent, which reads the file too; its own time is in whole seconds
        message = {"message": summary, "extraInfo": {"py_callstack": text, "timestamp": str(int(now))}}
        leave_word(folder, ERROR, {"message": message, "time": now, "echo": echo})
    return True
