"""metrics.jsonl: one JSON object a log point. Always written."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sheer.events import RunInfo
from sheer.loggers.lines import LineFile


class JSONL:
    """Appends `{"step": 50, "time": ..., "epoch": 2, "train/loss": ...}` to a file in the run's folder.

    `time` is in seconds since 1970. What a stopped run wrote after its last checkpoint is cut off when it goes on.

    Args:
        file: the file's name.
    """

    def __init__(self, file: str = "metrics.jsonl") -> None:
        self.file = file
        self._run: str | None = None
        self._path: Path | None = None
        self._size = 0
        self._lines: LineFile | None = None

    @property
    def client(self) -> Path | None:
        """The file's path; None before the run starts."""
        return self._path

    def start(self, info: RunInfo) -> None:
        """Open the file, cut back to what is this run's."""
        self._size = self._size if info.run_id == self._run else 0
        self._run, self._path = info.run_id, info.run_dir / self.file
        self._lines = LineFile(self._path, self._size)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        assert self._lines is not None
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3), **metrics}
        self._lines.append(json.dumps(record))
        self._size = self._lines.size

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()

    def state_dict(self) -> dict[str, Any]:
        """Return which run it is and how many bytes were written."""
        return {"run": self._run, "size": self._size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind as many bytes."""
        self._run, self._size = state["run"], state["size"]
