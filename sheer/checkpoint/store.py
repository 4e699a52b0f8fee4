"""Checkpoints on disk: written so that they are whole or not there, verified before they are read, pruned after a newer one is safe.

A checkpoint is a directory `step-00000200` with a `manifest.json` that names every file, its size and its SHA-256. The manifest is
renamed into place last: without it there is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sheer.errors import RunError, SheerWarning
from sheer.version import __version__

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint, as its manifest tells."""

    path: Path
    step: int
    metrics: Mapping[str, float]
    manifest: Mapping[str, Any]


def write_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Path:
    """Write a checkpoint and commit it.

    Args:
        directory: the folder of the run's checkpoints.
        step: the step that the state is of.
        tensors: for each safetensors file (named without its ending) the tensors in it.
        texts: for each JSON file (named without its ending) its content.
        facts: more lines of the manifest, such as the metrics.

    Raises:
        OSError, SafetensorError: it could not be written; what there was before is as it was.
    """
    final = directory / f"step-{step:08d}"
    path = directory / f".step-{step:08d}"
    for rest in directory.glob(".step-*"):  # of saves that were cut off
        shutil.rmtree(rest, ignore_errors=True)
    try:
        _write_files(path, step, tensors, texts, facts)
        if final.exists():
            shutil.rmtree(final)  # of this very step, before it was validated
        path.rename(final)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    _sync_directory(directory)
    return final


def _write_files(
    path: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write all files of a checkpoint, and its manifest last."""
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    for name, group in tensors.items():
        save_file(independent(group), path / f"{name}.safetensors")
    for name, content in texts.items():
        (path / f"{name}.json").write_text(json.dumps(content, allow_nan=False))
    files = {}
    for file in sorted(path.iterdir()):
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
            files[file.name] = {
                "size": file.stat().st_size,
                "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
            }
    manifest = {
        "format": FORMAT,
        "step": step,
        "sheer": __version__,
        "torch": torch.__version__,
        **facts,
        "files": files,
    }
    _replace_text(path / MANIFEST, json.dumps(manifest, indent=1))


def independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU that share no memory, so that each name can be loaded by itself (tied weights are written twice)."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().to("cpu").contiguous()
        storage = copy.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != copy.numel() * copy.element_size():
            copy = copy.clone()
        seen.add(copy.untyped_storage().data_ptr())
        out[name] = copy
    return out


def _replace_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, even if the power goes."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def committed(directory: Path) -> list[Saved]:
    """Return the checkpoints in a folder, oldest first; directories without a manifest are none."""
    found = []
    for path in sorted(directory.glob("step-*")):
        if not path.is_symlink() and (path / MANIFEST).is_file():
            try:
                manifest = json.loads((path / MANIFEST).read_text())
                values = manifest["metrics"].items()
                step = int(manifest["step"])
            except (ValueError, KeyError, TypeError, AttributeError):
                warnings.warn(
                    f"{path / MANIFEST} is damaged; the checkpoint is passed over.", SheerWarning, stacklevel=2
                )
                continue
            metrics = {name: value for name, value in values if isinstance(value, (int, float))}
            found.append(Saved(path, step, metrics, manifest))
    return sorted(found, key=operator.attrgetter("step"))


def verify(path: Path) -> Mapping[str, Any]:
    """Check every file of a checkpoint against its manifest, which is returned.

    Raises:
        RunError: there is no manifest, or a file is missing, of another size or of other content; it names the file.
    """
    if not (path / MANIFEST).is_file():
        raise RunError(f"{path} is no complete checkpoint: it has no {MANIFEST}, so its save was cut off.")
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        files = manifest["files"].items()
    except (ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{path / MANIFEST} is damaged: {error}.") from error
    if manifest["format"] > FORMAT:
        raise RunError(
            f"{path} was written by sheer {manifest['sheer']} in format {manifest['format']}; this one reads up to {FORMAT}."
        )
    for name, expected in files:
        file = path / name
        if not file.is_file():
            raise RunError(f"{file} is missing.")
        if file.stat().st_size != expected["size"]:
            raise RunError(f"{file} has {file.stat().st_size} bytes, and {expected['size']} were written.")
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected["sha256"]:
                raise RunError(f"{file} is damaged: its content is not what was written (SHA-256).")
    return manifest


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Read one safetensors file of a checkpoint; empty where the checkpoint has none of that name."""
    from safetensors.torch import load_file

    file = path / f"{name}.safetensors"
    return load_file(file) if file.exists() else {}


def read_text(path: Path, name: str) -> Any:
    """Read one JSON file of a checkpoint."""
    return json.loads((path / f"{name}.json").read_text())


def ranked(saves: Sequence[Saved], monitor: str | None, mode: str) -> list[Saved]:
    """Return the checkpoints that have the monitored metric, the best first; of equals the older."""
    if monitor is None:
        return []
    sign = 1.0 if mode == "min" else -1.0
    known = [(sign * saved.metrics[monitor], saved.step, saved) for saved in saves if monitor in saved.metrics]
    return [saved for _, _, saved in sorted(known, key=operator.itemgetter(0, 1))]


def prune(directory: Path, step: int, *, keep_last: int, keep_best: int, monitor: str | None, mode: str) -> None:
    """Point `last` and `best` at the newest and the best checkpoint, then delete what is neither among the last nor the best.

    The newest is that of `step`, which was just written. One of a later step was found damaged, and the run went on from an older
    one: it counts for nothing, or the good ones would be deleted in its favour.
    """
    found = committed(directory)
    saves = [saved for saved in found if saved.step <= step]
    best = ranked(saves, monitor, mode)[:keep_best]
    kept = {saved.path for saved in [*saves[-keep_last:], *best]}
    if saves:
        _link(directory / "last", saves[-1].path)
    if best:
        _link(directory / "best", best[0].path)
    for saved in found:
        if saved.path not in kept:
            (saved.path / MANIFEST).unlink()  # from here on it is no checkpoint, so a cut in between leaves no half one
            shutil.rmtree(saved.path)


def _link(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(link)
