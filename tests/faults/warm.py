"""A warm parent: a process that has imported all that a run imports, and never ran a backward, so that it can be forked in milliseconds.

What needs many processes is called in it (`Warm.call`), and forks them there (`fork`). A process of `multiprocessing` would import
for a second what training imports when it is first used.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.ranks import PRELOADED


class Warm:
    """The warm parent, as the test sees it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there,))
        self._process.start()
        there.close()

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float = 570.0) -> Any:
        """Call a function of a module there, in the folder that this process is in, and return what it returns.

        Raises:
            AssertionError: it raised an error, or took too long; it holds the traceback.
        """
        self._pipe.send((str(Path.cwd()), function, arguments))
        assert self._pipe.poll(timeout), f"{function.__name__}{arguments} did not end within {timeout} s"
        error, result = pickle.loads(self._pipe.recv_bytes())
        assert error is None, f"in the warm parent, {function.__name__}{arguments}:\n{error}"
        return result

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection) -> None:
    warm_up()
    while True:
        try:
            folder, function, arguments = pipe.recv()
        except EOFError:
            return
        os.chdir(folder)
        try:
            message: Any = (None, function(*arguments))
        except BaseException:
            message = (traceback.format_exc(), None)
        pipe.send_bytes(
            pickle.dumps(message)
        )  # whole: a tensor sent by `send` stays in memory that goes with the process


def warm_up() -> None:
    """Import what training imports late, and leave out what a test of faults need not wait for."""
    import torch

    import sheer.rundir

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers of loaders, as in a process of its own
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # of private ones in another version of PyTorch
            importlib.import_module(name)
    sheer.rundir.git_state = _no_git  # two more processes for each start
    assert threading.active_count() == 1, "what is forked has no other threads"


def _no_git(folder: Path) -> None:
    return None


@dataclass
class Child:
    """A forked process."""

    pid: int
    pipe: Connection
    code: int | None = None  # its exit code, below 0 for a signal; None: it runs

    def wait(self, timeout: float) -> int | None:
        """Wait until it has ended; None: it has not in so many seconds."""
        end = time.monotonic() + timeout
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                return None
            else:
                time.sleep(0.002)
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, if it has not ended."""
        if self.wait(0.0) is None:
            os.kill(self.pid, number)

    def returned(self) -> Any:
        """Return what its function returned, or the traceback of its error; None where it was killed."""
        try:
            return pickle.loads(self.pipe.recv_bytes()) if self.pipe.poll() else None
        except (EOFError, ConnectionResetError):
            return None


def fork(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Child:
    """Call a function in a forked process, which ends with it: by 0, by the status of a SystemExit, or by 1 with an error.

    What it returns must be small enough for a pipe (64 KiB), or be read while it runs.
    """
    here, there = multiprocessing.Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        there.close()
        return Child(pid, here)
    status = 1
    try:
        os.environ.update(environment or {})
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open("stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        try:
            message: Any = function(*arguments)
            status = 0
        except SystemExit as left:
            message, status = None, left.code if isinstance(left.code, int) else 1
        except BaseException:
            message = traceback.format_exc()
        there.send_bytes(pickle.dumps(message))
    finally:
        os._exit(status)
