"""Each rank writes what it has to say into a file of its own; the console shows rank 0."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import traceback
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType

from sheer.distributed.words import launcher_folder

STREAMS = (1, 2)  # the file descriptors of standard output and error, which C++ libraries write to as well


class RankOutput:
    """The output of a rank, from now on in `run_dir/ranks/rank-3.txt`; that of rank 0 also on the console, by way of `tee`."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.rank = rank
        self.path = run_dir / "ranks" / f"rank-{rank}.txt"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._copiers: list[subprocess.Popen[bytes]] = []
        flush_streams()
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._console = [os.dup(stream) for stream in STREAMS]
        if rank == 0:
            self._copy()
        else:
            for stream in STREAMS:
                os.dup2(self._file, stream)
        for writer in (sys.stdout, sys.stderr):
            if isinstance(writer, TextIOWrapper):
                writer.reconfigure(line_buffering=True)

    def _copy(self) -> None:
        """Send the streams through processes that write to the console and the file; a thread of this one could hang with it."""
        if shutil.which("tee") is None:
            return
        same = os.path.sameopenfile(*self._console)
        for stream, console in zip(STREAMS, self._console, strict=True):
            if stream == STREAMS[-1] and same:  # one copier keeps the order of the two
                os.dup2(STREAMS[0], stream)
                break
            read, write = make_channel(console)
            command = ["tee", "-a", str(self.path)]
            self._copiers.append(
                subprocess.Popen(command, stdin=read, stdout=console, stderr=subprocess.DEVNULL, start_new_session=True)
            )
            os.dup2(write, stream)
            os.close(read)
            os.close(write)

    def write_to_file(self, text: str) -> None:
        """Write to the file alone."""
        os.write(self._file, text.encode())

    def write_to_console(self, text: str) -> None:
        """Write to the console that was there before, each line behind the rank."""
        lines = "".join(f"[rank {self.rank}] {line}" for line in text.splitlines(keepends=True))
        os.write(self._console[1], lines.encode())

    def close(self) -> None:
        """Write to the console again."""
        flush_streams()
        for stream, console in zip(STREAMS, self._console, strict=True):
            os.dup2(console, stream)
            os.close(console)
        os.close(self._file)
        for copier in self._copiers:
            try:
                copier.wait(1.0)
            except subprocess.TimeoutExpired:  # a child of this process still writes
                continue


_open: RankOutput | None = None


def open_output(run_dir: Path, rank: int) -> None:
    """Write this rank's output to `run_dir/ranks/rank-<rank>.txt` until the process ends; that of rank 0 also to the console.

    An error that ends another rank still reaches the console: from here, or by the launcher.
    """
    global _open
    if _open is None:
        atexit.register(close_output)
        if rank > 0 and launcher_folder() is None:
            sys.excepthook = show_error
    else:
        _open.close()
    _open = RankOutput(run_dir, rank)


def close_output() -> None:
    """Write to the console again, if `open_output` was called."""
    global _open
    if _open is not None:
        _open.close()
        _open = None


def write_to_file(text: str) -> None:
    """Write to this rank's file, and nowhere else; nothing if it has none yet."""
    if _open is not None:
        _open.write_to_file(text)


def write_to_console(text: str) -> None:
    """Write to the console, each line behind the rank, also where this rank's output goes to its file."""
    if _open is not None:
        _open.write_to_console(text)
    else:
        print(text, file=sys.stderr, end="", flush=True)


def show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show an error that nothing caught, on the console and in the rank's file."""
    text = "".join(traceback.format_exception(kind, error, trace))
    write_to_file(text)
    write_to_console(text)


def flush_streams() -> None:
    """Write out what Python holds back."""
    for writer in (sys.stdout, sys.stderr):
        if writer is not None and not writer.closed:
            writer.flush()


def make_channel(console: int) -> tuple[int, int]:
    """Return two connected file descriptors, to read from and to write to.

    Where the console is a terminal they are one too, of the same size, so that a progress display is still one.
    """
    if not os.isatty(console):
        return os.pipe()
    import pty
    import termios

    read, write = pty.openpty()
    termios.tcsetwinsize(write, termios.tcgetwinsize(console))
    attributes = termios.tcgetattr(write)
    attributes[1] &= ~termios.OPOST  # the console turns line ends into what it needs
    termios.tcsetattr(write, termios.TCSANOW, attributes)
    return read, write
