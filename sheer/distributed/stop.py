"""Ranks that stop at the same point when one of them is told to, and end when one of them fails: without a collective.

Each rank has a thread that looks into the store where the ranks have met, once a second. A rank can stop at the end of a step, and between two
batches of a validation. It counts these points, of which all ranks pass the same, and compares two integers at each.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from sheer.distributed.hang import Place, describe_places, find_place, name_ranks
from sheer.distributed.output import flush_streams, write_to_console, write_to_file
from sheer.distributed.recorder import recorded_collectives
from sheer.distributed.words import report_error
from sheer.distributed.world import TIMEOUT
from sheer.progress import Progress

QUICK = 0.05  # seconds between two looks while the ranks agree on a step

_agreements = itertools.count()  # every rank makes the same ones in the same order


class StopAgreement:
    """Leads all ranks to stop at the same point. Needs a process group.

    Args:
        progress: its `step` is read, to say where a rank is.
        rank: of this process.
        world_size: how many ranks there are.
        every: seconds between two looks at the store.
        timeout: seconds to wait for a rank that does not answer.
    """

    def __init__(
        self, progress: Progress, rank: int, world_size: int, every: float = 1.0, timeout: float = TIMEOUT
    ) -> None:
        self.wait_at = sys.maxsize  # the number of the first point at which the others are waited for
        self._point = 0  # the number of the last one that was come to
        self._progress, self._rank, self._world_size = progress, rank, world_size
        self._every, self._timeout = every, timeout
        self._wanted: str | None = None  # why this rank was told to stop, until it has written that
        self._reason: str | None = None
        self._last: int | None = None  # the point to stop at, once it is agreed
        self._published = self._stuck = False
        self._answered = self._news = 0
        self._look_again = (-1, 0.0)  # the step, and when a hang is to be looked for in it
        self._agreed, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="sheer-stop", daemon=True)

    def heard(self, decided: str | None, received: str | None) -> str | None:
        """Return why the run stops at this point: what all ranks have decided, or what any of them was told.

        Args:
            decided: by all ranks alike.
            received: by this rank, from outside.

        Raises:
            TimeoutError: a rank did not say in time where it can stop; the others are named.
        """
        self._point += 1
        if received is not None:
            self.request(received)
        return decided if decided is not None or self._point < self.wait_at else self._wait()

    def start(self) -> None:
        """Begin to look for requests."""
        prefix = f"sheer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_agreements)}"
        group: Any = dist.group.WORLD  # torch's stubs lack its store
        self._store = PrefixStore(prefix, group.get_group_store().clone())  # a connection of its own
        self._thread.start()

    def close(self) -> None:
        """End the thread. A rank that closes has come to the end of its run, as all do: no step is to be waited for."""
        if self._closing.is_set() or not self._thread.is_alive():
            return
        self._closing.set()
        self._thread.join()
        try:
            if not self._published:
                self._store.set(f"boundary/{self._rank}", str(sys.maxsize))
            self._store.set(f"closed/{self._rank}", "")
            if self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                self._stay()
        except RuntimeError:
            return

    def _stay(self) -> None:
        """Wait until the other ranks have closed too: the store ends with this process, which would look like a failure."""
        closed = [f"closed/{rank}" for rank in range(self._world_size)]
        end = time.monotonic() + min(self._timeout, 60.0)
        while time.monotonic() < end and not self._store.check(closed) and not self._store.check(["failed"]):
            time.sleep(QUICK)

    def request(self, reason: str) -> None:
        """Ask all ranks to stop soon. Only sets a value: it may be called in a signal handler."""
        if self._wanted is None:
            self._wanted = reason

    def _wait(self) -> str | None:
        """Wait until all ranks have said at which point they can stop; returns why to stop, or None to go on until `wait_at`."""
        if self._last is None and not self._agreed.wait(self._timeout):
            raise TimeoutError(f"The ranks were to stop, and one did not answer.\n{self.stragglers()}")
        assert self._last is not None
        self.wait_at = self._last
        return self._reason if self._point >= self._last else None

    def failed(self, text: str) -> None:
        """Tell the other ranks that this one has failed; they end, and note the first line of `text`.

        If another was first, this one's failure follows from that: it ends here, quietly.
        """
        if not self._thread.ident:
            return
        with suppress(RuntimeError):
            self._tell_failure(text)

    def stragglers(self) -> str:
        """Name the ranks that the others wait for, and say where they are. Asks all ranks, for as long as three looks take."""
        self._stuck = True
        self._leave_it_to_the_first()
        asked = self._store.add("asked", 1)
        self._store.add("news", 1)
        self._answer(asked)
        keys = [f"place/{asked}/{rank}" for rank in range(self._world_size)]
        self._await(keys)
        places = []
        for rank, key in enumerate(keys):
            answer, beat = self._read(key), self._read(f"beat/{rank}") or {"step": 0, "time": time.time()}
            silent = Place(rank, beat["step"], silent=max(1.0, time.time() - beat["time"]))
            places.append(Place(**answer) if answer is not None else silent)
        return describe_places(places)

    def _leave_it_to_the_first(self) -> None:
        """Let one of the ranks whose time is over ask all the others: its error ends this rank. If none comes, go on."""
        if self._store.compare_set("asks", "", str(self._rank)).decode() == str(self._rank):
            return
        end = time.monotonic() + 6 * self._every + 2.0
        while time.monotonic() < end:
            self._end_if_told()
            time.sleep(self._every / 5)

    def _end_if_told(self) -> None:
        """End this process if another rank has failed."""
        failure = self._read("failed")
        if failure is not None and failure["rank"] != self._rank:
            self._end(failure["rank"], failure["text"])

    def _run(self) -> None:
        try:
            while not self._closing.wait(QUICK if self._published and self._last is None else self._every):
                self._look()
        except RuntimeError as error:  # of the store: all others are this module's own
            if not self._closing.is_set():
                self._end(0, f"the store where the ranks meet is gone ({error})")

    def _look(self) -> None:
        """Tell the others how far this rank is, and do what they ask for."""
        self._store.set(f"beat/{self._rank}", json.dumps({"step": self._progress.step, "time": time.time()}))
        if self._wanted is not None:
            self._store.compare_set("request", "", self._wanted)
            self._wanted = None
            self._store.add("news", 1)
        news = self._store.add("news", 0)
        if news != self._news:
            self._news = news
            self._hear()
        if self._published and self._last is None:
            self._conclude()
        self._look_for_hang()

    def _hear(self) -> None:
        """See what has come: a failure, a request to stop, a question."""
        self._end_if_told()
        asked = self._store.add("asked", 0)
        if asked > self._answered:
            self._answer(asked)
        if not self._published and self._store.check(["request"]):
            self._reason = self._store.get("request").decode()
            self._publish()

    def _publish(self) -> None:
        """Choose a point at which the loop will surely look at `wait_at`, and tell the others."""
        ahead = 1
        while True:
            # The loop counts a point, then looks at wait_at. So while the count is below what was written to wait_at before
            # the count was read, that point has not been come to, and wait_at will be seen there.
            self.wait_at = self._point + ahead
            if self._point < self.wait_at:
                break
            ahead *= 2
        self._store.set(f"boundary/{self._rank}", str(self.wait_at))
        self._published = True

    def _conclude(self) -> None:
        """Once all ranks have told theirs, the largest is the point to stop at."""
        keys = [f"boundary/{rank}" for rank in range(self._world_size)]
        if self._store.check(keys):
            self._last = max(int(value) for value in self._store.multi_get(keys))
            self._agreed.set()

    def _answer(self, asked: int) -> None:
        """Say where this rank is, to all who have asked."""
        place = json.dumps(dataclasses.asdict(find_place(self._rank, self._progress.step, self._stuck)))
        for number in range(self._answered + 1, asked + 1):
            self._store.set(f"place/{number}/{self._rank}", place)
        self._answered = asked

    def _look_for_hang(self) -> None:
        """See whether the device waits in a collective that will not end: NCCL raises nothing, its watchdog ends the process.

        So this comes a little before. The recorder is read only when a step takes long, and seldom.
        """
        now, (step, when) = time.time(), self._look_again
        if self._progress.step != step:
            self._look_again = (self._progress.step, now + 2 * self._every)
        elif now >= when:
            waiting = [c for c in recorded_collectives() if c.waiting and c.name.startswith("nccl")]
            over = min((c.began + c.timeout for c in waiting), default=now + 10.0) - 3 * self._every
            self._look_again = (step, max(over, now + self._every))
            if now >= over:
                self._give_up(f"{waiting[0]} was not finished within {waiting[0].timeout:g} s.")

    def _give_up(self, text: str) -> None:
        """End this process with an error of its own, while its main thread hangs."""
        text = f"{text}\n{self.stragglers()}\n"
        self._tell_failure(text)
        write_to_file(text)
        if not report_error(text, text.splitlines()[0], echo=False):
            write_to_console(text)
        flush_streams()
        os._exit(1)

    def _end(self, rank: int, text: str) -> None:
        """End this process, because another rank has failed: its error is shown, so this is quiet."""
        line = f"ended, because {name_ranks([rank]).lower()} failed: {text.strip().partition(chr(10))[0]}"
        write_to_file(f"{line}\n")
        report_error(line, line, echo=True)
        flush_streams()
        self._let_others_hear(rank)
        os._exit(1)

    def _let_others_hear(self, failed: int) -> None:
        """Where the store ends with this process, wait a moment until the others have seen which rank failed."""
        try:
            self._store.set(f"ended/{self._rank}", "")
            if self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                self._await([f"ended/{rank}" for rank in range(1, self._world_size) if rank != failed])
        except RuntimeError:  # the store is what has failed
            return

    def _await(self, keys: list[str]) -> None:
        """Wait until the store has all of these keys, for as long as three looks take."""
        end = time.monotonic() + 3 * self._every + 1.0
        while keys and time.monotonic() < end and not self._store.check(keys):
            time.sleep(QUICK)

    def _tell_failure(self, text: str) -> None:
        """Write that this rank has failed; if another has before, this one ends here."""
        own = json.dumps({"rank": self._rank, "text": text})
        first: dict[str, Any] = json.loads(self._store.compare_set("failed", "", own))
        self._store.add("news", 1)
        if first["rank"] != self._rank:
            self._end(first["rank"], first["text"])

    def _read(self, key: str) -> dict[str, Any] | None:
        """Return a value that is there, or None."""
        if not self._store.check([key]):
            return None
        value: dict[str, Any] = json.loads(self._store.get(key))
        return value
