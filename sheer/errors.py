"""The errors and the warning that Sheer raises for what a user can mend. Each says what was wrong, what was expected, what to do."""

from __future__ import annotations

import runpy
import sys
from types import TracebackType

# Modules that are not the user's, and may be between a warning and the line that led to it.
BETWEEN = frozenset({"sheer", "torch", *sys.stdlib_module_names})


class SheerError(Exception):
    """The base of all errors of Sheer's own."""


class SettingsError(SheerError, ValueError):
    """A setting that is unknown, of the wrong type, out of range, or in contradiction with another."""


class ContradictionError(SettingsError):
    """Settings are wrong together, each of which could be right."""


class StepError(SheerError, TypeError):
    """A step function that returned what cannot be trained on."""


class ModelError(SheerError, ValueError):
    """A model, optimizer and scheduler that do not fit together."""


class DataError(SheerError, ValueError):
    """A loader that cannot be used as it is, or that ended before its time."""


class RunError(SheerError, RuntimeError):
    """A run directory, or a checkpoint in it, that cannot be used."""


class MissingPackageError(SheerError, ImportError):
    """A package that is not among Sheer's own dependencies, asked for and not installed."""


class NonFiniteError(SheerError, FloatingPointError):
    """A loss or a gradient that became NaN or infinite."""


class BadStepsError(NonFiniteError):
    """Steps that were found to be bad, in a run that may go back to before them.

    Attributes:
        short: what went bad, in a few words.
        first, last: which they are.
    """

    def __init__(self, message: str, short: str, first: int, last: int) -> None:
        super().__init__(message)
        self.short, self.first, self.last = short, first, last


class SheerWarning(UserWarning):
    """Something that Sheer did or left undone, and that a user would want to know."""


def user_level() -> int:
    """Return the `stacklevel` with which a warning of the caller points at the user's line that led to it; 1 where there is none, as at exit."""
    level, frame = 1, sys._getframe().f_back
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in BETWEEN:
            return level
        level, frame = level + 1, frame.f_back
    return 1


def from_the_script(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback from a script on, without what has started it by `runpy`; all of it where nothing was started so."""
    part = trace
    while part is not None and not is_runpy(part):
        part = part.tb_next
    if part is None:
        return trace
    while part is not None and is_runpy(part):
        part = part.tb_next
    return part


def is_runpy(trace: TracebackType) -> bool:
    """Whether a line of a traceback is in the module that runs scripts."""
    return trace.tb_frame.f_code.co_filename in ("<frozen runpy>", runpy.__file__)
