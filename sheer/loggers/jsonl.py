"""metrics.jsonl: one JSON object a log point. Always written."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sheer.events import RunInfo
from sheer.loggers.lines import LineFile, is_empty, warn_of_other_lines


class JSONL:
    """Appends `{"step": 50, "time": ..., "epoch": 2, "train/loss": ...}` to a file in the run's folder.

    `time` is in seconds since 1970. What a stopped run wrote after its last checkpoint is cut off when it goes on; the rest is compared with
    the hash in the checkpoint.

    Args:
        file: the file's name.
    """

    def __init__(self, file: str = "metrics.jsonl") -> None:
        self.file = file
        self._run: str | None = None
        self._path: Path | None = None
        self._size = 0
        self._digest: str | None = None  # of the lines that count
        self._lines: LineFile | None = None

    @property
    def client(self) -> Path | None:
        """The file's path; None before the run starts."""
        return self._path

    def lost(self, info: RunInfo) -> Path | None:
        """Return the path of the file where a checkpoint has counted lines of it and there are none; called before `start`."""
        path = info.run_dir / self.file
        return path if info.run_id == self._run and self._size > 0 and is_empty(path) else None

    def start(self, info: RunInfo) -> None:
        """Open the file, cut back to what is this run's."""
        saved = self._digest if info.run_id == self._run else None
        self._size = self._size if info.run_id == self._run else 0
        self._run, self._path = info.run_id, info.run_dir / self.file
        if is_empty(self._path):
            saved = None
        self._lines = LineFile(self._path, self._size)
        self._digest = self._lines.digest()
        warn_of_other_lines(self._path, saved, self._digest, info.start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        assert self._lines is not None
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3), **metrics}
        self._lines.append(json.dumps(record))
        self._size, self._digest = self._lines.size, self._lines.digest()

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()

    def state_dict(self) -> dict[str, Any]:
        """Return which run it is, how many bytes were written, and their hash."""
        return {"run": self._run, "size": self._size, "sha256": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind as many bytes."""
        self._run, self._size, self._digest = state["run"], state["size"], state.get("sha256")
