"""What all tests share: a small, fast, fully determined task, and a folder to run in."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run each test in an empty folder, with the same seed, on one thread."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test in a folder in memory, where there is one: what saves often waits for a disk most of its time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        monkeypatch.chdir(folder)
        yield
        monkeypatch.undo()


class Exits:
    """Stands for `atexit` in one's own loops: what a test leaves unfinished is closed at its end, in its own folder."""

    def __init__(self) -> None:
        self.left: list[Any] = []

    def register(self, function: Any) -> None:
        self.left.append(function)

    def unregister(self, function: Any) -> None:
        self.left = [other for other in self.left if other != function]


@pytest.fixture(autouse=True)
def no_loop_outlives_its_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    exits = Exits()
    monkeypatch.setattr("sheer.own_loop.atexit", exits)
    yield
    for function in list(exits.left):
        function.__self__._close(None)
