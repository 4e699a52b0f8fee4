"""A script's own run, of which some steps are timed, some recorded, and nothing kept."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader

from sheer.callbacks.profiler import Profiler
from sheer.data.batch import move
from sheer.distributed.world import world
from sheer.events import events_of
from sheer.loggers.base import Loggers
from sheer.loggers.csv import CSV
from sheer.loggers.jsonl import JSONL
from sheer.loggers.tensorboard import TensorBoard
from sheer.loss import Step
from sheer.own_loop import Loop
from sheer.profile.phases import (
    BACKWARD,
    COPY,
    FORWARD,
    GRAPH,
    LOGGING,
    OPTIMIZER,
    SAVING,
    VALIDATION,
    Marked,
    MarkedCallback,
    MarkedSteps,
    Phases,
    Segment,
)
from sheer.profile.syncs import SyncFinder, WaitingLine
from sheer.run import Run
from sheer.scripts import as_main, run_script, standing_in
from sheer.settings import Settings
from sheer.trainer import Trainer

LOOP, OWN_LOOP, GRAPHS, START, FEED = map(
    importlib.import_module, ("sheer.loop", "sheer.own_loop", "sheer.speed.graph", "sheer.start", "sheer.data.feed")
)  # whose calls are marked
KEPT_LOGGERS = (JSONL, CSV, TensorBoard)  # they write into the folder of the run, which goes
FUNCTIONS = {
    "apply": OPTIMIZER,
    "log_training": LOGGING,
    "report": LOGGING,
    "made_by_graph": GRAPH,
    "validate": VALIDATION,
    "save_and_tell": SAVING,
    "tell_of_save": SAVING,
    "prepare_memory": SAVING,
}


class CannotProfile(Exception):
    """A script, or a run, that cannot be profiled; it says why, and what to do."""


class Profiled(BaseException):
    """Ends a script when enough of its steps were seen; no `except Exception` of the script stops it."""


@dataclass
class Seen:
    """What was seen of a run.

    Attributes:
        steps: of each step that was timed who had the clock when.
        by_callback: seconds of each class of callbacks in them.
        recorded: the steps in the trace.
        syncs: how often one step waited for the device, by place.
        left_out: what took no part, as words.
    """

    steps: list[list[Segment]] = field(default_factory=list)
    by_callback: dict[str, float] = field(default_factory=dict)
    recorded: int = 0
    syncs: Counter[WaitingLine] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    settings: Settings = field(default_factory=Settings)
    device: torch.device = field(default_factory=functools.partial(torch.device, "cpu"))
    optimizers: list[Any] = field(default_factory=list)
    parts: int = 1  # forward passes of a step
    workers: int | None = None  # of the loader; None: it is not a DataLoader
    parameters: int = 0


class Watcher:
    """Stands in the loop's place for what it calls, and ends the run when all was seen.

    Args:
        warmup: steps that are run first; in the second of them it is looked for what waits for the device.
        timed: steps that are timed.
        recorded: steps behind them that a profiler records.
        trace: the file that its trace is written to.
    """

    def __init__(self, warmup: int, timed: int, recorded: int, trace: Path) -> None:
        self.warmup, self.timed, self.recorded, self.trace = warmup, timed, recorded, trace
        self.phases, self.seen = Phases(), Seen()
        self.run: Run | None = None
        self.loop: Loop | None = None
        self._done = 0
        self._profile: Any = None
        self._is_eager = False
        self._original = {name: getattr(LOOP, name) for name in ("backward_of", "end_step", "training_data")}
        self._events_of, self._loggers_of = events_of, START.loggers_of
        self._until_end: Any = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Put marked functions in the place of those that the loop calls, and take them back."""
        new = {name: Marked(getattr(LOOP, name), self.phases, phase) for name, phase in FUNCTIONS.items()}
        own = {"backward_of": self.backward_of, "end_step": self.end_step, "training_data": self.training_data}
        places: list[tuple[Any, str, Any]] = [
            (module, name, value)
            for module in (LOOP, OWN_LOOP, GRAPHS)
            for name, value in {**new, **own}.items()
            if hasattr(module, name) and not (module is GRAPHS and name == "made_by_graph")
        ]
        places += [(START, "events_of", self.events_of), (START, "loggers_of", self.loggers_of)]
        places += [(FEED, "move", Marked(move, self.phases, COPY))]
        try:
            with ExitStack() as stack:
                for module, name, value in places:
                    stack.enter_context(standing_in(module, {name: value}))
                yield
        finally:
            self._compile_again()
            if self._profile is not None:
                self._profile.stop()
                self._profile = None

    def close(self, error: BaseException | None) -> None:
        """Close a loop of the script's own that was left in its middle."""
        if self.loop is not None and not self.loop._finished:
            self.loop._close(error)
        if self._until_end is not None:
            self._until_end.__exit__(None, None, None)

    def open(self) -> None:
        """Watch up to the end of the script.

        Raises:
            CannotProfile: it is watched already.
        """
        if self._until_end is not None:
            raise CannotProfile("sheer profile watches one loop, and this script starts a second one.")
        self._until_end = self.watching()
        self._until_end.__enter__()

    def events_of(self, callbacks: Sequence[object]) -> Any:
        """Stand for what sorts callbacks by their events."""
        if any(isinstance(callback, Profiler) for callback in callbacks):
            self.seen.left_out.append("the callback Profiler")
        others = [callback for callback in callbacks if not isinstance(callback, Profiler)]
        events = self._events_of(others)
        names = [event.name for event in fields(events)]
        marked = {id(callback): MarkedCallback(callback, self.phases) for callback in others}
        made = {name: tuple(marked[id(c)] for c in getattr(events, name)) for name in names}
        return type(events)(**{**made, "exception": ()})  # the run ends by one, which is none of theirs

    def loggers_of(self, *arguments: Any) -> Loggers:
        """Stand for what chooses the loggers: only those that keep nothing outside of the run's folder."""
        loggers = self._loggers_of(*arguments)
        kept = [logger for logger in loggers.members if isinstance(logger, KEPT_LOGGERS)]
        self.seen.left_out += [f"the logger {type(one).__name__}" for one in loggers.members if one not in kept]
        return Loggers(kept)

    def training_data(self, *arguments: Any) -> Any:
        """Stand for what makes the training data."""
        data = self._original["training_data"](*arguments)
        data.steps = MarkedSteps(data.steps, self.phases)
        loader = getattr(data.source, "loader", None)
        self.seen.workers = loader.num_workers if isinstance(loader, DataLoader) else None
        return data

    def backward_of(self, run: Run) -> Any:
        """Stand for what chooses how a step goes forward and backward."""
        self.run = run
        return MarkedTraining(self._original["backward_of"](run), self)

    def end_step(self, *arguments: Any) -> bool:
        """Stand for the end of a step."""
        stop: bool = self._original["end_step"](*arguments)
        self.phases.end_step()
        self._done += 1
        if self._done == 1 and self.run is not None:
            self._look_at(self.run, arguments[0])
            self.phases.watched = SyncFinder(self.run.compute.device)
            if self.seen.settings.compile:
                torch.compiler.set_stance("force_eager")  # what is watched is not seen from within compiled code
                self._is_eager = True
        elif self._done == 2 and self.phases.watched is not None:
            self.seen.syncs = self.phases.watched.found
            self.phases.watched = None
            self._compile_again()
        if self._done == self.warmup:
            if not stop:
                self._log_once(*arguments[:2])
            self.phases.restart()
        elif self._done > self.warmup and self._profile is None:
            self.seen.steps = self.phases.steps
            self.seen.by_callback = self.phases.by_callback
            if self._done == self.warmup + self.timed and not stop:
                self._record()
        elif self._profile is not None:
            self.seen.recorded += 1
        if self._profile is not None and (stop or self.seen.recorded == self.recorded):
            self._write()
            raise Profiled
        return stop

    def _look_at(self, run: Run, settings: Any) -> None:
        """Note what the advice needs to know of a run."""
        seen = self.seen
        seen.settings, seen.device, seen.optimizers = settings, run.compute.device, list(run.optimizers.values())
        seen.parameters = sum(parameter.numel() for parameter in run.model.parameters())
        left = None if run.info.total_steps is None else run.info.total_steps - self.warmup
        if left is not None and left < self.timed + self.recorded:
            self.recorded = min(self.recorded, max(1, left // 4))
            self.timed = max(1, left - self.recorded)

    def _log_once(self, settings: Any, run: Run) -> None:
        """Make a log point, and collect garbage: what only the first of them takes, such as to load a GPU's kernels, is not what each takes."""
        if run.progress.step % settings.log_every_n_steps != 0:
            LOOP.log_training(settings, run)
        gc.collect()

    def _compile_again(self) -> None:
        if self._is_eager:
            torch.compiler.set_stance("default")
            self._is_eager = False

    def _record(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.seen.device.type in ("cuda", "xpu"):
            torch.accelerator.synchronize()
            activities.append(ProfilerActivity.CUDA if self.seen.device.type == "cuda" else ProfilerActivity.XPU)
        self._profile = profile(activities=activities, acc_events=True)
        self._profile.start()
        self.phases.restart()
        self.phases.marks = True

    def _write(self) -> None:
        self.phases.marks = False
        if self.seen.device.type != "cpu":
            torch.accelerator.synchronize()
        self._profile.stop()
        self._profile.export_chrome_trace(str(self.trace))
        self._profile = None


class MarkedTraining:
    """What runs a step forward and backward: the user's function is one phase, the rest the other."""

    def __init__(self, function: Any, watcher: Watcher) -> None:
        self.function, self.watcher = function, watcher

    def __call__(self, settings: Any, run: Run, step_function: Any, *arguments: Any) -> Any:
        """Train on a batch."""
        phases, forward = self.watcher.phases, _Counted(step_function, self.watcher.phases)
        given = Marked(self.function, phases, BACKWARD)(settings, run, forward, *arguments)
        self.watcher.seen.parts = forward.calls
        return given


class _Counted:
    """A user's step function; its calls are a phase, and are counted."""

    def __init__(self, function: Any, phases: Phases) -> None:
        self._marked, self.calls = Marked(function, phases, FORWARD), 0
        self.__qualname__ = getattr(function, "__qualname__", "the step")

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self._marked(*arguments)


def watched_fit(
    trainer: Trainer,
    watcher: Watcher,
    fitted: Callable[..., Any],
    model: nn.Module,
    step: Step,
    train_loader: Any,
    val_loader: Any = None,
    *,
    eval_step: Step | None = None,
    optimizer: Any,
    scheduler: Any = None,
    parallelize: Any = None,
    resume_by_skipping: bool = False,
) -> NoReturn:
    """Stand for `Trainer.fit`."""
    keep_nowhere_else(trainer)
    with watcher.watching():
        fitted(
            trainer,
            model,
            step,
            train_loader,
            val_loader,
            eval_step=eval_step,
            optimizer=optimizer,
            scheduler=scheduler,
            parallelize=parallelize,
            resume_by_skipping=resume_by_skipping,
        )
    raise Profiled


def keep_nowhere_else(trainer: Trainer) -> None:
    """Let checkpoints go into the folder of the run, wherever the script has them."""
    saves = trainer.settings.checkpoint
    if saves is not None and saves.directory is not None:
        beside = dataclasses.replace(saves, directory=None)
        trainer.settings = dataclasses.replace(trainer.settings, checkpoint=beside)


def watched_start(
    trainer: Trainer,
    watcher: Watcher,
    started: Callable[..., Any],
    model: nn.Module,
    *,
    optimizers: Mapping[str, Any],
    schedulers: Mapping[str, Any] | None = None,
    total_steps: int | None = None,
    parallelize: Any = None,
) -> Loop:
    """Stand for `Trainer.start`."""
    keep_nowhere_else(trainer)
    watcher.open()
    given: Loop = started(
        trainer,
        model,
        optimizers=optimizers,
        schedulers=schedulers,
        total_steps=total_steps,
        parallelize=parallelize,
    )
    watcher.loop = given
    return given


def watch_script(
    script: Path, arguments: Sequence[str], changes: Mapping[str, str], warmup: int, timed: int, trace: Path
) -> Seen:
    """Run a script up to the end of the steps that are timed and recorded, and return what was seen.

    Args:
        script: the file.
        arguments: its own.
        changes: settings of its trainer, as text by name.
        warmup: steps that are run first.
        timed: steps that are timed; up to 5 more are recorded.
        trace: where the trace is written.

    Raises:
        CannotProfile: it made too few steps, or none, or runs on several ranks; an error of its own goes through.
    """
    if world().world_size > 1:
        raise CannotProfile("sheer profile watches one process. Start it without torchrun: `sheer profile train.py`.")
    watcher = Watcher(warmup, timed, min(timed, 5), trace)
    others = {
        "fit": functools.partialmethod(watched_fit, watcher, Trainer.fit),
        "start": functools.partialmethod(watched_start, watcher, Trainer.start),
    }
    ended: BaseException | None = None
    with tempfile.TemporaryDirectory(prefix="profile-", ignore_cleanup_errors=True) as folder:
        override = {
            **changes,
            "run_dir": f"{folder}/run",
            "fast_dev_run": "False",
            "autotune": "False",
        }
        try:
            with as_main(script, arguments), standing_in(Trainer, others):
                run_script(script, override)
        except Profiled as reached:
            ended = reached
        finally:
            watcher.close(ended or Profiled())
    if watcher.run is None:
        raise CannotProfile(
            f"{script} ended without a call of fit or start on a Trainer, so there is no run to profile."
        )
    if not watcher.seen.recorded:
        raise CannotProfile(
            f"The run ended after {watcher._done} steps, before any could be recorded: {warmup} of warm-up and {timed} that are timed come first. "
            "Let it train longer (--set max_steps=100, say), or ask for less with --warmup and --steps."
        )
    return watcher.seen
