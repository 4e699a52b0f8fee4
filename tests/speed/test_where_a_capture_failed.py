"""The place that is named where a step could not be captured is the user's, also below a folder named as the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sheer.metrics import Metrics
from sheer.speed.graph import reason_of


def test_the_users_line_is_named_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "sheer" / "train.py"
    names: dict[str, Any] = {"__name__": "__main__", "metrics": Metrics()}
    exec(compile("def step():\n    metrics.add(None, 1)", str(file), "exec"), names)
    try:
        names["step"]()
    except Exception as error:
        assert reason_of(error).endswith("(train.py:2)")
    else:
        raise AssertionError


def test_a_graph_that_the_memory_does_not_hold_is_no_fault_of_the_step() -> None:
    reason = "the device has not enough memory for a graph, which keeps what its steps need"
    assert reason_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")) == reason
