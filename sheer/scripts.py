"""How a command runs a user's script: as it runs by itself, with something in the place of what trains."""

from __future__ import annotations

import functools
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

from sheer.distributed.wrap import Parallelize
from sheer.errors import RunError, SettingsError
from sheer.launch import overriding
from sheer.loss import Step
from sheer.plugins import Plugins
from sheer.settings import Settings
from sheer.trainer import Trainer


@dataclass(frozen=True)
class Call:
    """What a script calls `fit` with."""

    settings: Settings
    plugins: Plugins
    model: nn.Module
    step: Step
    loader: Any
    optimizer: Optimizer | Callable[[nn.Module], Optimizer]
    scheduler: Any = None
    parallelize: Parallelize = None


class AtFit(BaseException):
    """Ends a script at its call of `fit`; no `except Exception` of the script stops it."""

    def __init__(self, call: Call) -> None:
        self.call = call


def stop_at_fit(
    trainer: Trainer,
    model: nn.Module,
    step: Step,
    train_loader: Any,
    val_loader: Any = None,
    *,
    eval_step: Step | None = None,
    optimizer: Optimizer | Callable[[nn.Module], Optimizer],
    scheduler: Any = None,
    parallelize: Parallelize = None,
    resume_by_skipping: bool = False,
) -> NoReturn:
    """Stand for `Trainer.fit`."""
    call = Call(trainer.settings, trainer.plugins, model, step, train_loader, optimizer, scheduler, parallelize)
    raise AtFit(call)


def refuse_own_loop(
    trainer: Trainer,
    verb: str,
    model: nn.Module,
    *,
    optimizers: Mapping[str, Any],
    schedulers: Mapping[str, Any] | None = None,
    total_steps: int | None = None,
    parallelize: Parallelize = None,
) -> NoReturn:
    """Stand for `Trainer.start`."""
    raise SettingsError(
        f"sheer {verb} runs the step of trainer.fit, and this script has a loop of its own (trainer.start), whose steps it does not know. "
        f"{verb.capitalize()} a script that calls fit on the same model."
    )


@contextmanager
def standing_in(owner: Any, others: Mapping[str, Any]) -> Iterator[None]:
    """Put others in the place of what a module or class has under their names, while this is entered."""
    before = {name: getattr(owner, name) for name in others}
    try:
        for name, other in others.items():
            setattr(owner, name, other)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def as_main(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """Give a script the command line and the folder of modules that it has when it is run; its step may look at them as well."""
    argv, folder = sys.argv, sys.path[0]
    sys.argv, sys.path[0] = [str(script), *arguments], str(script.resolve().parent)
    try:
        yield
    finally:
        sys.argv, sys.path[0] = argv, folder


def run_script(script: Path, changes: Mapping[str, str]) -> None:
    """Run a script in this process; its trainers have these settings, as text by name, and go on from nothing."""
    with overriding({**changes, "resume": "None"}):
        runpy.run_path(str(script), run_name="__main__")


def run_to_fit(script: Path, changes: Mapping[str, str], verb: str) -> Call:
    """Run a script up to its first call of `fit`, and return what it passed.

    Args:
        script: the file.
        changes: settings of its trainer, as text by name.
        verb: what the command does with it, which is its name.

    Raises:
        SettingsError: it starts a loop of its own.
        RunError: it ended without such a call.
    """
    others = {"fit": stop_at_fit, "start": functools.partialmethod(refuse_own_loop, verb)}
    try:
        with standing_in(Trainer, others):
            run_script(script, changes)
    except AtFit as reached:
        return reached.call
    raise RunError(f"{script} ended without a call of fit on a Trainer, so there is nothing to {verb}.")
