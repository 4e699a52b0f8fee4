"""metrics.jsonl: one JSON object a log point. Always written."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, TextIO

from sheer.events import RunInfo


class JSONL:
    """Appends `{"step": 50, "epoch": 2, "time": ..., "train/loss": ...}` to `metrics.jsonl` in the run's folder."""

    def __init__(self) -> None:
        self._offset = 0
        self._file: TextIO | None = None

    def start(self, info: RunInfo) -> None:
        """Open the file; what a stopped run wrote after its last checkpoint is cut off."""
        path = info.run_dir / "metrics.jsonl"
        path.touch()
        self._file = path.open("r+", encoding="utf-8")
        self._file.truncate(self._offset)
        self._file.seek(0, 2)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        if self._file is not None:
            record: dict[str, Any] = {"step": step, "time": round(time.time(), 3), **metrics}
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def state_dict(self) -> dict[str, Any]:
        """Return how many bytes were written."""
        return {"offset": self._file.tell() if self._file is not None else self._offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind as many bytes."""
        self._offset = state["offset"]
