"""The phases of a step: who has the clock, step by step. Only a run that is profiled has them; the loop knows nothing of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

DATA, COPY, FORWARD, BACKWARD, OPTIMIZER = "waiting for data", "copying", "forward", "backward", "optimizer"
LOGGING, VALIDATION, SAVING, CALLBACKS, REST = "logging", "validation", "saving", "callbacks", "unaccounted"
GRAPH = "replaying the graph"
PHASES = (DATA, COPY, GRAPH, FORWARD, BACKWARD, OPTIMIZER, LOGGING, VALIDATION, SAVING, CALLBACKS, REST)
USERS = (FORWARD, CALLBACKS)  # those in which the user's own code runs on the device

Segment = tuple[str, float, float]  # a phase, and when it had the clock: from, to, in seconds


class Phases:
    """Gives the clock to one phase at a time: one that is inside of another takes it from that.

    So the parts of a step are exactly its time.

    Attributes:
        watched: what the steps are run under in the user's own phases, if anything: a context.
        marks: whether phases are marked in the trace of a profiler.
        steps: for each step that has ended since `restart` who had the clock when.
        by_callback: seconds of each class of callbacks since then.
    """

    def __init__(self) -> None:
        self.watched: Any = None
        self.marks = False
        self.steps: list[list[Segment]] = []
        self.by_callback: dict[str, float] = {}
        self._stack: list[tuple[str, Any]] = []
        self._segments: list[Segment] = []
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Forget what was measured; the next step begins now."""
        self.steps, self.by_callback, self._segments, self._since = [], {}, [], time.perf_counter()

    def enter(self, phase: str) -> None:
        """Give a phase the clock."""
        self._close()
        mark = None
        if self.marks:
            from torch.profiler import record_function

            mark = record_function(phase)
            mark.__enter__()
        self._stack.append((phase, mark))

    def leave(self) -> None:
        """Give the clock back to the phase around this one."""
        self._close()
        _, mark = self._stack.pop()
        if mark is not None:
            mark.__exit__(None, None, None)

    def end_step(self) -> None:
        """End a step, and begin the next."""
        self._close()
        self.steps.append(self._segments)
        self._segments = []

    def _close(self) -> None:
        now = time.perf_counter()
        self._segments.append((self._stack[-1][0] if self._stack else REST, self._since, now))
        self._since = now


class Marked:
    """A function whose calls are a phase."""

    def __init__(self, function: Callable[..., Any], phases: Phases, phase: str) -> None:
        self.function, self.phases, self.phase = function, phases, phase

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call it."""
        with InPhase(self.phases, self.phase):
            return self.function(*arguments, **named)


class InPhase:
    """A context that is a phase."""

    def __init__(self, phases: Phases, phase: str) -> None:
        self.phases, self.phase = phases, phase
        self.watched = phases.watched if phase in USERS else None

    def __enter__(self) -> None:
        self.phases.enter(self.phase)
        if self.watched is not None:
            self.watched.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.watched is not None:
            self.watched.__exit__(kind, error, trace)
        self.phases.leave()


class MarkedCallback:
    """A callback whose events are a phase; all else of it is its own."""

    def __init__(self, callback: Any, phases: Phases) -> None:
        self._callback, self._phases = callback, phases

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._callback, name)
        if not name.startswith("on_"):
            return value
        return MarkedEvent(value, self._phases, type(self._callback).__name__)


class MarkedEvent:
    """A callback's method."""

    def __init__(self, function: Callable[..., Any], phases: Phases, owner: str) -> None:
        self.function, self.phases, self.owner = function, phases, owner

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        began = time.perf_counter()
        with InPhase(self.phases, CALLBACKS):
            given = self.function(*arguments)
        taken = time.perf_counter() - began
        self.phases.by_callback[self.owner] = self.phases.by_callback.get(self.owner, 0.0) + taken
        return given


class MarkedSteps:
    """Stands for the method of the training data that yields its steps."""

    def __init__(self, steps: Callable[..., Iterator[Any]], phases: Phases) -> None:
        self.steps, self.phases = steps, phases

    def __call__(self, *arguments: Any) -> Iterator[Any]:
        """Yield the steps; to wait for one is a phase."""
        stream = self.steps(*arguments)
        while True:
            with InPhase(self.phases, DATA):
                batch = next(stream, None)
            if batch is None:
                return
            yield batch


def seconds_of(step: list[Segment]) -> dict[str, float]:
    """Return how long each phase had the clock in a step."""
    taken = dict.fromkeys(PHASES, 0.0)
    for phase, since, until in step:
        taken[phase] += until - since
    return taken
