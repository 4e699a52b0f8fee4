"""The launcher's watch over the ranks of its machine: it passes on being told to stop, and ends the others when one has failed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, Std

from sheer.distributed.words import ERROR, FOLDER_OF_WORDS, LEFT, RUNS
from sheer.signals import SIGNALS

PERIOD = 0.05  # seconds between two looks at the ranks
GRACE = 3.0  # seconds that a rank with an error has to end by itself


class RankWatch:
    """Watches the processes that the agent has started last."""

    def __init__(self) -> None:
        self.folders: list[Path] = []  # by local rank; each attempt has its own
        self.killed: set[int] = set()  # processes that are ended because another failed
        self._stop: int | None = None  # the signal that told the launcher to stop
        self._told: set[int] = set()
        self._failing: dict[int, float] = {}  # since when a process is known to have failed
        self._ended: set[int] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sheer-watch", daemon=True)

    def begin(self, folders: list[Path]) -> None:
        """Watch the ranks that are about to be started, in place of earlier ones. Called in the main thread."""
        self.folders = folders
        if not self._thread.is_alive():
            for name in SIGNALS:
                signal.signal(getattr(signal, name), self._take)
            signal.signal(signal.SIGCHLD, self._look_at_ends)
            self._thread.start()

    def close(self) -> None:
        """Watch no longer."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def all_left(self) -> bool:
        """Whether all ranks of this machine have saved and left because they were told to."""
        return bool(self.folders) and all((folder / LEFT).exists() for folder in self.folders)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._stop is None:
            self._stop = number
            name = signal.Signals(number).name
            print(f"\n{name}: telling the ranks to stop. Once more kills them.", file=sys.stderr, flush=True)
            return
        for process in self._processes().values():
            end_group(process)
        raise SystemExit(128 + number)

    def _look_at_ends(self, number: int, frame: FrameType | None) -> None:
        """Note which ranks have failed, before the agent takes their status: it would first ask the others to end, and wait."""
        for process in self._processes().values():
            self._look_at_end(process)

    def _run(self) -> None:
        while not self._closing.wait(PERIOD):
            processes = self._processes()
            for folder, process in processes.items():
                self._look_at_end(process)
                if (folder / ERROR).exists():
                    self._failing.setdefault(process, time.monotonic())
            if self._failing.keys() & set(processes.values()):
                self._end_all(list(processes.values()))
            elif self._stop is not None:
                self._pass_on(list(processes.values()), self._stop)

    def _processes(self) -> dict[Path, int]:
        """Return the processes that run so far, by the folder of the rank."""
        return {
            folder: json.loads((folder / RUNS).read_text())["pid"]
            for folder in self.folders
            if (folder / RUNS).exists()
        }

    def _look_at_end(self, process: int) -> None:
        """Note whether a process has ended, and whether it failed; its status is left for the agent to take."""
        if process in self._ended:
            return
        try:
            end = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # the agent has taken it
            self._ended.add(process)
            return
        if end is not None:
            self._ended.add(process)
            if end.si_code != os.CLD_EXITED or end.si_status != 0:
                self._failing.setdefault(process, time.monotonic())

    def _end_all(self, processes: list[int]) -> None:
        """End the ranks that wait for one that has failed, and that one itself if it takes long to end."""
        for process in processes:
            since = self._failing.get(process)
            if process in self._ended or (since is not None and time.monotonic() - since < GRACE):
                continue
            if since is None:
                self.killed.add(process)
            end_group(process)

    def _pass_on(self, processes: list[int], number: int) -> None:
        for process in processes:
            if process not in self._told and process not in self._ended:
                self._told.add(process)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)


class RankFolders(LogsSpecs):
    """Tells torch's agent where ranks leave errors: in folders that the watch reads. Their output stays where it goes."""

    def __init__(self, root: Path, watch: RankWatch) -> None:
        super().__init__(str(root), Std.NONE, Std.NONE, None)
        self._root = root
        self._watch = watch
        self._attempts = 0

    @property
    def root_log_dir(self) -> str:
        """The folder of all of it."""
        return str(self._root)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Make the folders of the ranks that are about to be started, and put them into the environment of each."""
        self._attempts += 1
        folders = [self._root / f"{self._attempts}-{rank}" for rank in sorted(envs)]
        for rank, folder in enumerate(folders):
            folder.mkdir()
            envs[rank][FOLDER_OF_WORDS] = str(folder)
            envs[rank]["TORCHELASTIC_ERROR_FILE"] = str(folder / ERROR)
        self._watch.begin(folders)
        to_console = dict.fromkeys(range(len(folders)), "")
        return LogsDest(
            stdouts=to_console,
            stderrs=dict(to_console),
            error_files={rank: str(folder / ERROR) for rank, folder in enumerate(folders)},
        )


def end_group(process: int) -> None:
    """Kill a rank and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
