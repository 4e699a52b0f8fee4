"""Where a `sheer` command and the script that it runs meet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

CHANGES_OF_RANKS = "SHEER_SET"  # the variable in which the launcher hands --set to the ranks that it starts, as JSON

_overrides: dict[str, str] = {}


def overrides() -> Mapping[str, str]:
    """Return the settings that the command line sets, as text by name; also those given to the launcher of this rank."""
    given: dict[str, str] = json.loads(os.environ.get(CHANGES_OF_RANKS, "{}"))
    return {**given, **_overrides}


@contextmanager
def overriding(changes: Mapping[str, str]) -> Iterator[None]:
    """Set settings of every trainer that is made while this is entered."""
    _overrides.update(changes)
    try:
        yield
    finally:
        for name in changes:
            _overrides.pop(name, None)
