"""Being asked to stop: Ctrl-C, SIGTERM (a scheduler takes the machine back), SIGUSR1 (SLURM's warning)."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # that tell a run to stop, where a system has them
EXIT_STATUS = 85  # of a process that saved and left because it was told to


class StopSignals:
    """While entered, the first signal is remembered in `received`; a second one leaves at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker of a loader, which Ctrl-C reaches too: its parent decides
            return
        if self.received is not None:
            self.__exit__(None, None, None)
            raise KeyboardInterrupt("A second signal: leaving at once.")
        self.received = signal.Signals(number).name
        print(
            f"\n{self.received}: stopping after this step. Once more leaves at once, without saving.",
            file=sys.stderr,
            flush=True,
        )


class ToldToLeave(Exception):
    """No error: a run was told to stop while it validated. The validation is run again, whole, when the run goes on."""


def is_signal(reason: str | None) -> bool:
    """Whether a run stopped because it was told to from outside."""
    return (reason or "").startswith("SIG")
