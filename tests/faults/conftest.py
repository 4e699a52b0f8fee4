"""What the tests of faults share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.warm import Warm


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    """A warm parent, which forks the processes of a module's tests."""
    parent = Warm()
    yield parent
    parent.close()
