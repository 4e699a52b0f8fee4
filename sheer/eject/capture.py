"""Runs a script up to the call that trains, in a process of its own, and writes down what was passed.

Run as `python -m sheer.eject.capture FACTS SCRIPT [ARGUMENTS]`; `capture` does that and reads the facts.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from sheer.eject.facts import Facts, Plugin, Span
from sheer.eject.program import Refusal

REACHED = 86  # exit status of a process that wrote its facts


class Reached(BaseException):
    """Ends the script at its call; no `except Exception` of the script stops it."""


def capture(script: Path, arguments: Sequence[str]) -> Facts:
    """Run a script up to its first call that trains, and return the facts of that call.

    Raises:
        Refusal: the script failed before it, or never came to it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "facts.json"
        command = [sys.executable, "-m", "sheer.eject.capture", str(file), str(script), *arguments]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, env={**os.environ, "SHEER_EJECT": "1"})
        if done.returncode == REACHED:
            return Facts.from_json(file.read_text())
    if done.returncode:
        raise Refusal(
            f"{script} failed before it came to fit (see above). It must run up to that call; what follows is never run."
        )
    raise Refusal(f"{script} ended without a call of fit or start on a Trainer, so there is no loop to eject.")


class _Observer:
    """Stands for `Trainer.__init__`, `fit` and `start` while a script is captured."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.made: dict[int, tuple[object, str, Span]] = {}

    def install(self) -> None:
        """Put the observer in place of the trainer's methods."""
        from sheer.trainer import Trainer

        make, observer = Trainer.__init__, self

        def observed(trainer: Any, **settings: Any) -> None:
            make(trainer, **settings)
            observer.made[id(trainer)] = (trainer, *_called_from())

        def fit(trainer: Any, *arguments: Any, **named: Any) -> NoReturn:
            observer.reached(trainer, "fit", inspect.signature(fitted).bind(trainer, *arguments, **named).arguments)

        def start(trainer: Any, *arguments: Any, **named: Any) -> NoReturn:
            observer.reached(trainer, "start", inspect.signature(started).bind(trainer, *arguments, **named).arguments)

        fitted, started = Trainer.fit, Trainer.start
        Trainer.__init__, Trainer.fit, Trainer.start = observed, fit, start  # type: ignore[method-assign, assignment]

    def reached(self, trainer: Any, kind: str, arguments: dict[str, Any]) -> NoReturn:
        """Write the facts of a call down, and end the script."""
        file, call = _called_from()
        _, trainer_file, made = self.made[id(trainer)]
        facts = facts_of(trainer, kind, arguments)
        self.file.write_text(
            dataclasses.replace(facts, file=file, call=call, trainer_file=trainer_file, trainer=made).to_json()
        )
        raise Reached


def _called_from() -> tuple[str, Span]:
    """Return the file and the place of the innermost call that is not in the library."""
    own = str(Path(__file__).resolve().parent.parent)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(Path(frame.f_code.co_filename).resolve()).startswith(own):
        frame = frame.f_back
    assert frame is not None
    positions = inspect.getframeinfo(frame).positions
    assert positions is not None and positions.lineno is not None
    span = Span(positions.lineno, positions.col_offset or 0, positions.end_lineno or 0, positions.end_col_offset or 0)
    return str(Path(frame.f_code.co_filename).resolve()), span


def facts_of(trainer: Any, kind: str, arguments: dict[str, Any]) -> Facts:
    """Return what matters of a trainer and the arguments of a call; where they stand is put in by the caller."""
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

    from sheer.build import takes_step_number
    from sheer.data.choose import make_source

    model, scheduler, optimizer = arguments.get("model"), arguments.get("scheduler"), arguments.get("optimizer")
    steps = {name: arguments[name] for name in ("step", "eval_step") if arguments.get(name) is not None}
    loader, val_loader = arguments.get("train_loader"), arguments.get("val_loader")
    functions = []
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        functions.append("optimizer")
    if scheduler is not None and not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
        functions.append("scheduler")
    source = make_source(loader, seed=0, device=trainer.device) if loader is not None else None
    return Facts(
        file="",
        call=Span(0, 0, 0, 0),
        trainer_file="",
        trainer=Span(0, 0, 0, 0),
        kind=kind,
        settings=dataclasses.asdict(trainer.settings),
        callbacks=tuple(_plugin(callback) for callback in trainer.plugins.callbacks),
        loggers=tuple(_plugin(logger) for logger in trainer.plugins.loggers),
        none=tuple(name for name in ("val_loader", "eval_step", "scheduler") if arguments.get(name) is None),
        functions=tuple(functions),
        plateau=isinstance(scheduler, ReduceLROnPlateau),
        numbered=tuple(name for name, step in steps.items() if takes_step_number(step, model=model)),
        has_hparams=trainer.plugins.hparams is not None,
        loader=type(source).__name__ if source is not None else "",
        workers=getattr(loader, "num_workers", 0),
        val_names=tuple(val_loader) if isinstance(val_loader, dict) else None,
    )


def _plugin(value: object) -> Plugin:
    from sheer.events import EVENTS

    return Plugin(
        type(value).__name__,
        type(value).__module__,
        tuple(event.removeprefix("on_") for event in EVENTS if hasattr(value, event)),
        hasattr(value, "state_dict") and hasattr(value, "load_state_dict"),
        hasattr(value, "averages"),
    )


def main(file: str, script: str, *arguments: str) -> int:
    """Run a script up to its call; the facts go to `file`."""
    _Observer(Path(file)).install()
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except Reached:
        return REACHED
    return 0


if __name__ == "__main__":
    from sheer.eject.capture import main as captured_main

    status = captured_main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # neither workers nor exit handlers of the script are to run
