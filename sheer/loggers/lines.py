"""A text file that grows by whole lines, whatever happens while it is written."""

from __future__ import annotations

from pathlib import Path


class LineFile:
    """Appends lines, each handed to the system at once. What a failed write left of one is cut off before the next.

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

    def close(self) -> None:
        """Close the file, at the end of its last whole line."""
        if not self._file.closed:
            with self._file:
                self._file.truncate(self.size)
