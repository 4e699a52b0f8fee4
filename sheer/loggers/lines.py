"""A text file that grows by whole lines, whatever happens while it is written."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from sheer.errors import SheerWarning, user_level


class LineFile:
    """Appends lines, each handed to the system at once. What a failed write left of one is cut off before the next.

    What is in it is hashed once when it is opened, and each line as it is written: a checkpoint keeps the hash.

    Args:
        path: the file; made if it is not there.
        size: how many bytes of what is in it are kept. Should fewer be there, as after a power failure, its whole lines are.
    """

    def __init__(self, path: Path, size: int) -> None:
        path.touch()
        present = path.stat().st_size
        if present < size:
            size = path.read_bytes().rfind(b"\n") + 1
        self.size = size
        self._file = path.open("r+b", buffering=0)
        self._file.truncate(size)
        with path.open("rb") as kept:
            self._hash = hashlib.file_digest(kept, "sha256")

    def append(self, line: str) -> None:
        """Write a line.

        Raises:
            OSError: it could not be written; the file goes on as if it had not been tried.
        """
        content = f"{line}\n".encode()
        self._file.truncate(self.size)
        self._file.seek(self.size)
        rest = memoryview(content)
        while rest:  # a disk that runs full takes a part first, and refuses the rest at the next call
            rest = rest[self._file.write(rest) :]
        self.size += len(content)
        self._hash.update(content)

    def digest(self) -> str:
        """Return the SHA-256 of what is in it, in hexadecimal."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file, at the end of its last whole line."""
        if not self._file.closed:
            with self._file:
                self._file.truncate(self.size)


def is_empty(path: Path) -> bool:
    """Whether nothing is in a file, as on a machine that a run was not on before."""
    return not path.is_file() or path.stat().st_size == 0


def warn_of_other_lines(path: Path, saved: str | None, found: str, step: int) -> None:
    """Warn where the lines of a log that a checkpoint has counted are not those that were written; what it tells of the model is not touched.

    Args:
        path: of the log.
        saved: the hash that the checkpoint has of these lines; None: it was saved without.
        found: that of the lines that are there.
        step: of the checkpoint.
    """
    if saved not in (None, found):
        warnings.warn(
            f"{path} is damaged or was edited: its lines up to step {step:,} are not those that were written (SHA-256) when the checkpoint of that "
            "step was saved. The run goes on: what it trains does not depend on them.",
            SheerWarning,
            stacklevel=user_level(),
        )
