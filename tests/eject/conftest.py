"""Scripts that are captured, tried and compared run in forked processes; where a test says so, in new ones."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from tests import forked


@pytest.fixture(autouse=True)
def in_forked_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("new_processes") is None:
        for name in ("capture", "check", "verify"):
            stand_in = SimpleNamespace(run=forked.run, DEVNULL=subprocess.DEVNULL)
            monkeypatch.setattr(f"sheer.eject.{name}.subprocess", stand_in)
