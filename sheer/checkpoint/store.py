"""Checkpoints: written so that they are whole or not there, verified before they are read, deleted after what replaces them is safe.

A checkpoint is a folder `step-00000200`. Each rank writes the tensors that it alone holds, or holds first, and what differs from rank
to rank; then what it wrote, with sizes and SHA-256 hashes, as `rank-00001.json`. Rank 0 waits for those of all, and writes
`manifest.json`, which names every file: without it there is no checkpoint. No rank waits for another otherwise.
"""

from __future__ import annotations

import hashlib
import json
import operator
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from sheer.checkpoint.bucket import Folder
from sheer.checkpoint.disk import step_of, sync
from sheer.checkpoint.layout import Part
from sheer.errors import RunError, SheerWarning, user_level
from sheer.version import __version__

FORMAT = 2
MANIFEST = "manifest.json"
_TOLD = "rank-{:05d}.json"


@dataclass(frozen=True)
class Content:
    """What a rank adds to a checkpoint."""

    step: int
    rank: int
    world_size: int
    leads: bool  # whether its state has the optimizers of its stage of the model
    tensors: Mapping[str, Mapping[str, Tensor]]  # by the group that they belong to, then by name
    parts: Mapping[str, Mapping[str, Part]]  # of those that are only part of a tensor, which part
    is_whole: bool  # whether the groups of this rank hold all that there is
    texts: Mapping[str, Any]  # files of JSON, by name
    facts: Mapping[str, Any]  # more lines of the manifest, such as the metrics
    logs: Sequence[Path] = ()  # files outside, of which the state says how long they are


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint, as its manifest tells."""

    path: Path
    step: int
    metrics: Mapping[str, float]
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay."""

    last: int = 1  # how many of the newest
    best: int = 0  # how many of the best by `monitor`
    every: int | None = None  # those of each n-th step
    monitor: str | None = None
    mode: str = "min"


def file_of(kind: str, rank: int, world_size: int, is_whole: bool = False) -> str:
    """Return the name, without its ending, of what a rank writes of a kind: `model`, or `model-00003-of-00008`."""
    return kind if is_whole or world_size == 1 else f"{kind}-{rank:05d}-of-{world_size:05d}"


def write_checkpoint(disk: Folder, name: str, content: Content, timeout: float, gone: Event) -> Saved | None:
    """Write this rank's part of a checkpoint; rank 0 waits for the others' and commits it. What there was before stays as it is.

    Args:
        disk: where the checkpoints are.
        name: of the new one, which no folder has yet.
        content: what this rank adds.
        timeout: how many seconds rank 0 waits for the others.
        gone: is set where nobody waits for the checkpoint any more.

    Returns:
        the checkpoint; None on other ranks than the first.

    Raises:
        OSError, SafetensorError: it could not be written.
        RunError: other ranks did not write theirs.
    """
    folder = disk.begin(name)
    try:
        files = write_files(folder, content)
        disk.settle(name, list(files))
        own = {"leads": content.leads, "files": files}
        if content.rank > 0:
            disk.write(name, _TOLD.format(content.rank), json.dumps(own))
            return None
        for path in (*content.logs, *{log.parent for log in content.logs}):
            sync(path)
        told = [own, *(_told_by(disk, name, rank, timeout, gone) for rank in range(1, content.world_size))]
        manifest = {
            "format": FORMAT,
            "step": content.step,
            "sheer": __version__,
            "torch": torch.__version__,
            "world_size": content.world_size,
            **content.facts,
            "leads": [rank for rank, one in enumerate(told) if one["leads"]],
            "files": {file: facts for one in told for file, facts in one["files"].items()},
        }
        disk.write(name, MANIFEST, sealed(manifest))
    except BaseException:
        for path in folder.glob(f"*-{content.rank:05d}*" if content.world_size > 1 else "*"):
            path.unlink(missing_ok=True)  # what a full disk has no room for
        if content.world_size == 1:
            with suppress(OSError):
                folder.rmdir()
        raise
    return Saved(disk.path(name), content.step, numbers_in(manifest["metrics"]), manifest)


def _told_by(disk: Folder, name: str, rank: int, timeout: float, gone: Event) -> dict[str, Any]:
    """Wait for what another rank says that it wrote."""
    end = time.monotonic() + timeout
    while True:
        text = disk.read(name, _TOLD.format(rank))
        try:
            return dict(json.loads(text or ""))
        except ValueError:  # it is not there, or not as a whole
            if time.monotonic() > end or gone.is_set():
                raise RunError(f"Rank {rank} has not written its part of {disk}/{name} within {timeout:g} s.") from None
        time.sleep(disk.patience)


def write_files(folder: Path, content: Content) -> dict[str, dict[str, Any]]:
    """Write tensors and texts, and return the size and the hash of each file."""
    from safetensors.torch import save_file

    names = []
    for group, tensors in content.tensors.items():
        if tensors or content.is_whole:
            all_of_it = content.is_whole and group != "state"
            names.append(f"{file_of(group, content.rank, content.world_size, all_of_it)}.safetensors")
            parts = {name: [part.begins, part.shape] for name, part in content.parts.get(group, {}).items()}
            save_file(
                dict(tensors), folder / names[-1], {"format": "pt", **({"parts": json.dumps(parts)} if parts else {})}
            )
    for text, value in content.texts.items():
        names.append(f"{file_of(text, content.rank, content.world_size)}.json")
        (folder / names[-1]).write_text(json.dumps(value, allow_nan=False))
    return {name: {"size": (folder / name).stat().st_size, "sha256": hash_of(folder / name)} for name in names}


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sealed(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as text, with the hash of the rest of it."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint's folder.

    Raises:
        RunError: there is none, it is damaged, or of another format.
    """
    file = path / MANIFEST
    return manifest_from(file.read_bytes() if file.is_file() else None, str(path), path.resolve().name)


def manifest_of(disk: Folder, name: str) -> dict[str, Any]:
    """Read the manifest of a checkpoint, wherever it is.

    Raises:
        RunError: there is none, it is damaged, or of another format.
    """
    return manifest_from(disk.read(name, MANIFEST), f"{disk}/{name}", name)


def manifest_from(text: bytes | None, path: str, name: str) -> dict[str, Any]:
    """Return what the text of a manifest says.

    Args:
        text: of the file; None: there is none.
        path: of the checkpoint, for messages.
        name: of its folder.

    Raises:
        RunError: there is none, it is damaged, or of another format, or does not say what a manifest says.
    """
    if text is None:
        raise RunError(f"{path} is no complete checkpoint: it has no {MANIFEST}, so its save was cut off.")
    file = f"{path}/{MANIFEST}"
    try:
        manifest: dict[str, Any] = json.loads(text)
        version, digest = manifest["format"], manifest.pop("sha256", None)
        is_as_written = digest is not None and sealed(manifest).encode() == text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{file} is damaged: {error!r}.") from error
    if version != FORMAT:
        raise RunError(
            f"{path} was written by sheer {manifest.get('sheer')} in format {version}; this one reads format {FORMAT}."
        )
    if not is_as_written:
        raise RunError(f"{file} is damaged: its content is not what was written (SHA-256).")
    if not is_complete(manifest):
        raise RunError(f"{file} is not what a save writes: its entries are missing, or of another kind.")
    strange = [file for file in manifest["files"] if file in ("", "..") or Path(file).name != file]
    if strange:
        raise RunError(f"{path}/{MANIFEST} names {strange[0]!r}, which is no file of the checkpoint's own folder.")
    stated = step_of(name)
    if stated is not None and stated[0] != manifest["step"]:
        raise RunError(f"{path} is of step {manifest['step']}, and its name says otherwise: was it renamed?")
    return manifest


def is_complete(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has the entries that are read, each of its kind."""
    kinds = {"step": int, "world_size": int, "run_id": str, "metrics": dict, "settings": dict, "leads": list}
    files = manifest.get("files")
    return (
        all(isinstance(manifest.get(name), kind) for name, kind in kinds.items())
        and bool(manifest["leads"])
        and all(rank in range(manifest["world_size"]) for rank in manifest["leads"])
        and isinstance(files, dict)
        and all(isinstance(f, dict) and isinstance(f.get("size"), int) and "sha256" in f for f in files.values())
    )


def numbers_in(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that can be compared: not those that are NaN or infinite, which a manifest holds as texts."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}


def committed(disk: Folder, *, quiet: bool = False) -> list[Saved]:
    """Return the checkpoints in a folder, oldest first; one whose manifest is damaged is warned of, unless that is to be `quiet`."""
    found = []
    for name in disk.names():
        text, path = disk.read(name, MANIFEST), disk.path(name)
        if text is not None:
            try:
                manifest = manifest_from(text, f"{disk}/{name}", name)
            except RunError as error:
                if not quiet:
                    warnings.warn(f"{error} The checkpoint is passed over.", SheerWarning, stacklevel=user_level())
                continue
            found.append(Saved(path, manifest["step"], numbers_in(manifest["metrics"]), manifest))
    return found


def verify(path: Path, part: tuple[int, int] = (0, 1)) -> Mapping[str, Any]:
    """Check the files of a checkpoint against its manifest, which is returned.

    Args:
        path: its folder.
        part: which of them: (k, n) is every n-th from the k-th on, where ranks share the work.

    Raises:
        RunError: there is no manifest, or a file is missing, of another size or of other content; it names the file.
    """
    manifest = read_manifest(path)
    for name in sorted(manifest["files"])[part[0] :: part[1]]:
        check_file(path, name, manifest["files"][name], hash_of)
    return manifest


def brought(disk: Folder, name: str) -> Path:
    """Bring this process's part of a checkpoint to where it can be read, verified; return the folder.

    Raises:
        RunError: its save was cut off, or it is damaged; the error names the file.
    """
    manifest = manifest_of(disk, name)
    folder = disk.bring(name, [MANIFEST, *sorted(manifest["files"])[disk.part[0] :: disk.part[1]]])
    try:
        verify(folder, disk.part)
    except RunError as error:
        raise RunError(str(error).replace(str(folder), f"{disk}/{name}")) from error
    return folder


def check_file(path: Path, name: str, expected: Mapping[str, Any], digest: Callable[[Path], str]) -> None:
    """Compare a file of a checkpoint with what its manifest says of it; `digest` returns the hash of a file.

    Raises:
        RunError: it is missing, a link, of another size or of other content.
    """
    file = path / name
    if file.is_symlink():
        raise RunError(f"{file} is a link, and a save writes none: what it points at is not read.")
    if not file.is_file():
        raise RunError(f"{file} is missing.")
    if file.stat().st_size != expected["size"]:
        raise RunError(f"{file} has {file.stat().st_size} bytes, and {expected['size']} were written.")
    if digest(file) != expected["sha256"]:
        raise RunError(f"{file} is damaged: its content is not what was written (SHA-256).")


def ranked(saves: Sequence[Saved], monitor: str | None, mode: str) -> list[Saved]:
    """Return the checkpoints that have the monitored metric, the best first; of equals the older."""
    if monitor is None:
        return []
    sign = 1.0 if mode == "min" else -1.0
    known = [(sign * saved.metrics[monitor], saved.step, saved) for saved in saves if monitor in saved.metrics]
    return [saved for _, _, saved in sorted(known, key=operator.itemgetter(0, 1))]


def staying_of(saves: Sequence[Saved], keep: Retention) -> list[Saved]:
    """Return which of a run's checkpoints, oldest first, stay: of each step at most the newest."""
    newest = list({saved.step: saved for saved in saves}.values())
    best = ranked(newest, keep.monitor, keep.mode)[: keep.best]
    every = [saved for saved in newest if keep.every is not None and saved.step % keep.every == 0]
    chosen = {saved.path for saved in [*newest[-keep.last :], *best, *every]}
    return [saved for saved in newest if saved.path in chosen]


def prune(disk: Folder, saves: Sequence[Saved], keep: Retention) -> list[Saved]:
    """Point `last` and `best` at the newest and the best checkpoint, then delete the others that do not stay; return those that do.

    Args:
        disk: where they are.
        saves: the checkpoints of this run, oldest first, down to the one that was just written. What else is in the folder stays.
        keep: which stay.
    """
    staying = staying_of(saves, keep)
    point_links(disk, staying, keep)
    for saved in saves:
        if saved not in staying:
            disk.remove(saved.path.name, MANIFEST)
    return staying


def point_links(disk: Folder, saves: Sequence[Saved], keep: Retention) -> None:
    """Point `last` and `best` at the newest and the best of some checkpoints, oldest first, where they do not yet."""
    best = ranked(saves, keep.monitor, keep.mode)[: min(keep.best, 1)]
    for link, saved in [*(("last", saved) for saved in saves[-1:]), *(("best", saved) for saved in best)]:
        if disk.pointed(link) != saved.path.name:
            disk.point(link, saved.path.name)
