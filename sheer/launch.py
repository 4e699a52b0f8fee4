"""Where a `sheer` command and the script that it runs meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_overrides: dict[str, str] = {}


def overrides() -> Mapping[str, str]:
    """Return the settings that the command line sets, as text by name."""
    return _overrides


@contextmanager
def overriding(changes: Mapping[str, str]) -> Iterator[None]:
    """Set settings of every trainer that is made while this is entered."""
    _overrides.update(changes)
    try:
        yield
    finally:
        for name in changes:
            _overrides.pop(name, None)
