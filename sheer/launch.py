"""Where a `sheer` command and the script that it runs meet."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

CHANGES_OF_RANKS = "SHEER_SET"  # the variable in which the launcher hands --set to the ranks that it starts, as JSON

_overrides: dict[str, str] = {}
_taken: set[str] = set()  # the names of those that a trainer was made with


def overrides() -> Mapping[str, str]:
    """Return the settings that the command line sets, as text by name; also those given to the launcher of this rank."""
    given: dict[str, str] = json.loads(os.environ.get(CHANGES_OF_RANKS, "{}"))
    return {**given, **_overrides}


def take_overrides() -> Mapping[str, str]:
    """Return what `overrides` does, to a trainer that is made."""
    changes = overrides()
    _taken.update(changes)
    return changes


@contextmanager
def overriding(changes: Mapping[str, str]) -> Iterator[None]:
    """Set settings of every trainer that is made while this is entered."""
    _overrides.update(changes)
    try:
        yield
    finally:
        for name in changes:
            _overrides.pop(name, None)
            _taken.discard(name)


@contextmanager
def telling_of_untaken(script: str) -> Iterator[None]:
    """While a script runs: say at its end, on stderr, what was set for no trainer, since none was made. Its status stays, and so does its error."""
    try:
        yield
    except SystemExit:
        tell_of_untaken(script)
        raise
    tell_of_untaken(script)


def tell_of_untaken(script: str) -> None:
    """Say which settings of the command line no trainer of this process was made with, if there are any."""
    untaken = " ".join(f"--set {name}={value}" for name, value in overrides().items() if name not in _taken)
    if untaken:
        print(
            f"{untaken} set nothing: {script} built no Trainer in this process. Build one in it, or leave --set out.",
            file=sys.stderr,
            flush=True,
        )
