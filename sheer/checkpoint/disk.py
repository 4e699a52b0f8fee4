"""The folder of a run's checkpoints on a file system, written so that what is there is whole, even if the power goes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")  # the second number: of several saves of one step


def step_of(name: str) -> tuple[int, int] | None:
    """Return of which step a checkpoint's folder is, and the how manieth save of it; None for another folder."""
    match = NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 1)) if match else None


def unused_name(names: Iterable[str], step: int) -> str:
    """Return a name for a new checkpoint of a step, behind those of earlier saves of it."""
    known = [step_of(name) for name in names]
    number = 1 + max((key[1] for key in known if key is not None and key[0] == step), default=0)
    return f"step-{step:08d}" if number == 1 else f"step-{step:08d}-{number}"


def linked(link: Path) -> Path | None:
    """Return the checkpoint that a link points to, or None where there is no such link."""
    return link.parent / link.readlink() if link.is_symlink() else None


class Disk:
    """The folder that a run's checkpoints are in, one folder each.

    Args:
        root: the folder.
        part: which part of the files of a checkpoint this process verifies: (k, n) is every n-th from the k-th on.
    """

    patience = 0.01  # seconds between two looks at whether another rank has written

    def __init__(self, root: Path, part: tuple[int, int] = (0, 1)) -> None:
        self.root, self.part = root, part

    def __str__(self) -> str:
        return str(self.root)

    @property
    def here(self) -> Path | None:
        """Where this process may put files of its own."""
        return self.root

    def names(self) -> list[str]:
        """Return the folders that may be checkpoints, or the rest of a save that was cut off, in the order of their steps."""
        found = [(step_of(path.name), path) for path in self.root.glob("step-*")]
        known = [(key, path.name) for key, path in found if key is not None and path.is_dir() and not path.is_symlink()]
        return [name for _, name in sorted(known)]

    def unused(self, step: int) -> str:
        """Return a name for a new checkpoint of a step, behind those of earlier saves of it."""
        return unused_name((path.name for path in self.root.glob(f"step-{step:08d}*")), step)

    def begin(self, name: str) -> Path:
        """Make a checkpoint's folder, and return where its files are to be written."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)  # of several ranks, one is first
        return folder

    def settle(self, name: str, files: list[str]) -> None:
        """Wait until the files of a checkpoint are on the disk."""
        for file in files:
            sync(self.root / name / file)
        sync(self.root / name)
        sync(self.root)

    def path(self, name: str) -> Path:
        """Return where a checkpoint is, for people and for what reads it."""
        return self.root / name

    def pointed_path(self, link: str) -> Path | None:
        """Return the checkpoint that a link points at; None where there is no such link."""
        return linked(self.root / link)

    def read(self, name: str, file: str) -> bytes | None:
        """Return what is in a small file of a checkpoint; None where there is none."""
        path = self.root / name / file
        return path.read_bytes() if path.is_file() else None

    def sizes(self, name: str) -> dict[str, int]:
        """Return the sizes of what is in a checkpoint's folder, in bytes."""
        return {path.name: path.lstat().st_size for path in sorted((self.root / name).iterdir())}

    def when(self, name: str, file: str) -> float:
        """Return when a file of a checkpoint was written, in seconds since 1970."""
        return (self.root / name / file).stat().st_mtime

    def write(self, name: str, file: str, text: str) -> None:
        """Write a file that is there whole or not at all."""
        path = self.root / name / file
        temporary = path.with_name(f".{file}.tmp")
        with temporary.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync(path.parent)

    def pointed(self, link: str) -> str | None:
        """Return the checkpoint that a link points at; None where there is no such link."""
        path = self.root / link
        return path.readlink().name if path.is_symlink() else None

    def point(self, link: str, name: str) -> None:
        """Point a link of the folder at a checkpoint."""
        temporary = self.root / f".{link}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name)
        temporary.replace(self.root / link)
        sync(self.root)

    def unpoint(self, link: str) -> None:
        """Remove a link of the folder."""
        (self.root / link).unlink(missing_ok=True)

    def remove(self, name: str, manifest: str) -> None:
        """Delete a checkpoint; its manifest goes first, so that a cut leaves none that is half there."""
        (self.root / name / manifest).unlink(missing_ok=True)
        sync(self.root / name)
        shutil.rmtree(self.root / name)

    def bring(self, name: str, files: Sequence[str]) -> Path:
        """Return the folder in which files of a checkpoint can be read."""
        return self.root / name

    def forget(self) -> None:
        """Delete what `bring` has brought: nothing."""


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
