"""metrics.csv: a table, one row a log point, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sheer.checkpoint.disk import sync
from sheer.events import RunInfo
from sheer.loggers.lines import LineFile, is_empty, warn_of_other_lines


class CSV:
    """Writes a row a log point, and one a validation, to a file in the run's folder.

    The columns are step, time (in seconds since 1970), epoch, and the metrics in the order in which they first came. When a new
    one comes, the file is written anew beside itself with empty cells for it, and renamed into place: at any time it is a whole
    table. What a stopped run wrote after its last checkpoint is cut off when it goes on, columns included; the rest is compared with the
    hash in the checkpoint.

    Args:
        file: the file's name.
    """

    def __init__(self, file: str = "metrics.csv") -> None:
        self.file = file
        self._run: str | None = None
        self._path: Path | None = None
        self._columns: list[str] = []
        self._rows = 0
        self._digest: str | None = None  # of the table as it counts
        self._lines: LineFile | None = None

    @property
    def client(self) -> Path | None:
        """The file's path; None before the run starts."""
        return self._path

    def lost(self, info: RunInfo) -> Path | None:
        """Return the path of the file where a checkpoint has counted rows of it and there are none; called before `start`."""
        path = info.run_dir / self.file
        return path if info.run_id == self._run and self._rows > 0 and is_empty(path) else None

    def start(self, info: RunInfo) -> None:
        """Open the file, cut back to what is this run's."""
        if info.run_id != self._run:
            self._columns, self._rows, self._digest = [], 0, None
        self._run, self._path = info.run_id, info.run_dir / self.file
        saved = None if is_empty(self._path) else self._digest
        self._path.touch()
        self._digest = self._rewrite(self._path, self._columns).digest()
        warn_of_other_lines(self._path, saved, self._digest, info.start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row."""
        assert self._path is not None
        record = {"step": step, "time": round(time.time(), 3), **metrics}
        new = [name for name in record if name not in self._columns]
        lines = self._lines
        if new or lines is None:
            lines = self._rewrite(self._path, [*self._columns, *new])
        lines.append(",".join(str(record.get(name, "")) for name in self._columns))
        self._rows += 1
        self._digest = lines.digest()

    def _rewrite(self, path: Path, columns: list[str]) -> LineFile:
        """Give the file these columns and the rows that count, and open it. Its values are numbers, so no comma is in one."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        temporary = path.with_name(f".{path.name}.new")
        with path.open(encoding="utf-8") as old, temporary.open("w", encoding="utf-8", newline="") as new:
            if columns:
                new.write(header(columns) + "\n")
            rows = 0
            for line in itertools.islice(old, 1, 1 + self._rows):
                if line.endswith("\n"):
                    new.write(resized(line.removesuffix("\n"), len(columns)) + "\n")
                    rows += 1
        sync(temporary)
        temporary.replace(path)
        self._columns, self._rows = columns, rows
        self._lines = LineFile(path, path.stat().st_size)
        return self._lines

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def state_dict(self) -> dict[str, Any]:
        """Return which run it is, the columns, how many rows were written, and the hash of the table."""
        return {"run": self._run, "columns": list(self._columns), "rows": self._rows, "sha256": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind as many rows."""
        self._run, self._columns, self._rows = state["run"], state["columns"], state["rows"]
        self._digest = state.get("sha256")


def header(columns: Sequence[str]) -> str:
    """Return the first line of a table; names with commas, quotes or line breaks in them are quoted."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow([name.replace("\n", " ") for name in columns])
    return line.getvalue()


def resized(row: str, width: int) -> str:
    """Return a row with so many cells: the first of them, and empty ones behind."""
    cells = row.split(",")[:width]
    return ",".join([*cells, *[""] * (width - len(cells))])
