"""The folder of a run, and what is written to it and shown while it trains."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from sheer.events import Events, RunInfo, named
from sheer.run import Run
from sheer.signals import EXIT_STATUS

PlainLoggers = tuple[Any, ...]


def plain_log(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    """Append a line to metrics.jsonl, and tell the loggers."""
    with (run.info.run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
    for logger in run.loggers.members:
        logger.log(step, metrics)


def plain_report(result: Any, metrics: Mapping[str, float]) -> None:
    """Append what was measured after a run to its metrics.jsonl."""
    with (result.run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": result.step, "time": round(time.time(), 3), **metrics}) + "\n")


def plain_console_log(step: int, metrics: Mapping[str, float]) -> None:
    """Print metrics in a line."""
    print(f"step {step:,}", *(f"{name} {value:.4g}" for name, value in metrics.items()), sep=" · ", flush=True)


def plain_logger_states(run: Run) -> dict[str, Any]:
    """Return how long metrics.jsonl is, and the states of the loggers."""
    return {
        "JSONL": {"run": run.info.run_id, "size": (run.info.run_dir / "metrics.jsonl").stat().st_size},
        **{name: logger.state_dict() for name, logger in named(run.loggers.members).items()},
    }


def plain_load_loggers(run: Run, states: Mapping[str, Any]) -> None:
    """Cut metrics.jsonl back to where it was, and give the loggers their states."""
    os.truncate(run.info.run_dir / "metrics.jsonl", states["JSONL"]["size"])
    for name, logger in taking_back(run.loggers.members).items():
        if name in states:
            logger.load_state_dict(states[name])


def taking_back(loggers: tuple[Any, ...]) -> dict[str, Any]:
    """Return the loggers that are given back their state when a run goes on, by its name."""
    return named(loggers)


@contextmanager
def plain_session(run: Run) -> Iterator[None]:
    """Open the loggers, and close them whatever happens."""
    for logger in run.loggers.members:
        logger.start(run.info)
    try:
        yield
    except BaseException as error:
        for callback in run.events.exception:
            callback.on_exception(error)
        raise
    finally:
        for logger in run.loggers.members:
            logger.close()


def plain_folder(run_dir: Path, goes_on: bool, saves: bool) -> Path:
    """Make the folder of a run; one that is there is refused, unless the run goes on."""
    run_dir.mkdir(parents=True, exist_ok=goes_on)
    if saves:
        (run_dir / "metrics.jsonl").touch()  # a checkpoint notes how long it is
    return run_dir


@contextmanager
def plain_eval_mode(model: nn.Module, events: Events) -> Iterator[None]:
    """Put the model in eval mode, and then each of its parts back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    for starting in events.evaluation_start:
        starting.on_evaluation_start(model)
    yield
    for ending in reversed(events.evaluation_end):
        ending.on_evaluation_end(model)
    for module in training:
        module.training = True


class PlainStopSignals:
    """While entered, Ctrl-C and SIGTERM are remembered in `received`; the second leaves at once."""

    received: str | None = None

    def __enter__(self) -> PlainStopSignals:
        self.before = {n: signal.signal(n, self.take) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def take(self, number: int, frame: object) -> None:
        """Note a signal."""
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class PlainTensorBoard:
    """Writes TensorBoard's event files to a folder in the run's folder."""

    def __init__(self, folder: str = "tensorboard") -> None:
        self.folder = folder

    def start(self, info: RunInfo) -> None:
        """Open a new event file; what others in the folder hold of steps that will be made again is hidden."""
        self.writer = SummaryWriter(str(info.run_dir / self.folder), purge_step=info.start_step + 1, flush_secs=10)

    def start_again(self, run_dir: Path) -> None:
        """Open a new event file for what is measured after the run."""
        self.writer = SummaryWriter(str(run_dir / self.folder), flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a scalar for each metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()

    def state_dict(self) -> dict[str, Any]:
        """Write what is left, since a run that goes on from here will not write it again."""
        self.writer.flush()
        return {"run": None}


def plain_leave(run: Run, signals: PlainStopSignals) -> None:
    """End the process if it was told to; a scheduler may start it again."""
    if signals.received is not None:
        raise SystemExit(EXIT_STATUS)
