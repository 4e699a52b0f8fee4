"""Kills this very process in the middle of what it does to the disk: before a call, halfway through it, or behind it."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

# All that a run calls to change what is on the disk, but for the lines it appends to its logs.
CALLS: tuple[tuple[Any, str], ...] = (
    (safetensors.torch, "save_file"),
    (pathlib.Path, "write_text"),
    (pathlib.Path, "mkdir"),
    (os, "fsync"),
    (pathlib.Path, "replace"),
    (pathlib.Path, "symlink_to"),
    (pathlib.Path, "unlink"),
    (shutil, "rmtree"),
)
PLACES = ("before", "half", "after")


def label(call: str, path: str) -> str:
    """Return what a call is called, whatever the step: `fsync manifest.json`, `mkdir step-N`."""
    name = Path(path).name
    if not re.fullmatch(r"(model|optimizer|training|state|rank).*", name):
        name = re.sub(r"(?<=step-N)-\d+", "", re.sub(r"(?<=\.run\.json\.)\d+", "N", re.sub(r"\d{8}", "N", name)))
    return f"{call} {name}"


@dataclass(frozen=True)
class Kill:
    """Where to kill: at the n-th of the calls with a label, or of all where that is empty."""

    label: str
    place: str
    number: int = 0


class Watched:
    """Counts the calls by which a run changes what is in its folder, and kills at one of them."""

    def __init__(self, folder: str, kill: Kill | None) -> None:
        self.folder, self.kill, self.seen = folder, kill, list[str]()
        self._left = 0 if kill is None else kill.number
        self._lock = threading.RLock()

    def install(self) -> None:
        """Take the place of what a run calls."""
        for owner, name in CALLS:
            setattr(owner, name, self._wrapped(name, getattr(owner, name)))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            target = _target(name, args)
            if self.folder not in Path(target).parts:
                return call(*args, **options)
            place = self._place(label(name, target))
            if place == "before":
                die()
            if place == "half":
                _half(name, target, call, args, options)
                die()
            result = call(*args, **options)
            if place == "after":
                die()
            return result

        return watched

    def _place(self, called: str) -> str | None:
        """Return where to kill in this call; None: nowhere."""
        with self._lock:
            self.seen.append(called)
            if self.kill is None or self.kill.label not in ("", called):
                return None
            self._left -= 1
            return self.kill.place if self._left == -1 else None


def _target(name: str, args: tuple[Any, ...]) -> str:
    """Return the path that a call is about."""
    if name == "fsync":
        return str(Path(f"/proc/self/fd/{args[0]}").readlink())
    return str(args[1] if name == "save_file" else args[0])


def _half(name: str, target: str, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Do half of what a call does, where that can be halved."""
    path = Path(target)
    if name == "save_file":
        call(*args, **options)
        os.truncate(path, path.stat().st_size // 2)
    elif name == "fsync" and path.is_file() and path.suffix == ".tmp":  # the write before it was halved
        os.truncate(path, path.stat().st_size // 2)
    elif name == "write_text":
        call(args[0], args[1][: len(args[1]) // 2], **options)
    elif name == "rmtree":
        for inside in sorted(path.iterdir())[::2]:
            inside.unlink()


def die() -> None:
    """End this process as a power cut would, but for what the kernel holds."""
    os.kill(os.getpid(), signal.SIGKILL)
