"""The weights of a checkpoint, and the way into a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sheer.checkpoint.bucket import Bucket, Folder, share_of_machine, url_of
from sheer.checkpoint.disk import Disk, step_of
from sheer.checkpoint.foreign import (
    Renamed,
    Weights,
    foreign_weights,
    numbers_in_tensor,
    refuse_unmatched,
    renamed,
    suggested_rename,
)
from sheer.checkpoint.read import read_shared_state, stored_in
from sheer.checkpoint.store import MANIFEST, brought, committed, read_manifest
from sheer.errors import RunError, SettingsError, SheerWarning, user_level
from sheer.rundir import read_record


def load_weights(
    model: nn.Module,
    source: str | Path,
    which: str = "best",
    *,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
) -> Path:
    """Load weights into a model, and return where they are from. Nothing that is read can run code.

    Args:
        model: takes the weights, in place; where it is divided over ranks, each takes its part.
        source: a run's directory, a checkpoint's directory, the URL of either in an object store, a safetensors file, a Hugging Face folder (`model.safetensors`, or several files and
            their index), or what `torch.save` wrote: a state_dict, or a Lightning checkpoint.
        which: of a run's directory, "best", "last", or a step's, as "step-00000100".
        strict: raise an error where names are missing or superfluous, or shapes differ; otherwise what fits is loaded, and a warning lists
            what does not. That nothing fits is an error always.
        rename: regular expressions, and what replaces them in the names of the source, one after the other: `{r"^encoder\\.": "backbone."}`.

    Raises:
        RunError: there are no such weights, they are damaged, or of another model; all names that do not fit are listed.
        SettingsError: `rename` holds what is no regular expression, or matches no name.
        TypeError: what was given is no model, or no path.
    """
    refuse_mix_ups(model, source, rename)
    found = foreign_weights(Path(source)) if url_of(source) is None else None
    if found is not None:
        load_renamed(model, *found, Path(source), strict, rename)
        return Path(source)
    disk, name = checkpoint_at(source, which, None)
    try:
        path = brought(disk, name)
        manifest = read_manifest(path)
        extra = read_shared_state(path, manifest)["extra"]
        load_renamed(model, stored_in(path, manifest, "model"), extra, disk.path(name), strict, rename)
    finally:
        disk.forget()
    return disk.path(name)


def refuse_mix_ups(model: Any, source: Any, rename: Any) -> None:
    """Raise an error where what `load_weights` is given is of other kinds, as when two are swapped."""
    if not isinstance(model, nn.Module):
        swapped = " They are swapped." if isinstance(source, nn.Module) else ""
        raise TypeError(
            f"load_weights takes the model first and then where the weights are, and was given a {type(model).__name__} as the model.{swapped}"
        )
    if isinstance(source, (Mapping, nn.Module)):
        taken = "source" if isinstance(source, Mapping) else "source.state_dict()"
        raise TypeError(
            f"load_weights reads files, and was given a {type(source).__name__}, whose weights are in memory: call model.load_state_dict({taken})."
        )
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"load_weights takes the path or the URL of weights, not a {type(source).__name__}.")
    if rename is not None and not isinstance(rename, Mapping):
        raise SettingsError(
            f'rename is a {type(rename).__name__}, and it takes a dict of patterns: {{r"^encoder\\.": "backbone."}}.'
        )


def load_renamed(
    model: nn.Module,
    weights: Weights,
    extra: dict[str, Any],
    source: Path,
    strict: bool,
    patterns: Mapping[str, str] | None,
) -> None:
    """Load weights under other names, where there are patterns for such."""
    if patterns:
        refuse_unmatched([*weights, *extra], patterns, source)
        extra = {renamed(name, patterns): value for name, value in extra.items()}
        weights = Renamed(weights, patterns)
    load_model(model, weights, extra, source, strict=strict)


def checkpoint_at(source: str | Path, which: str, beside: Folder | None) -> tuple[Folder, str]:
    """Return the checkpoint that a path or a URL means: itself, or the last or best of a run; and the folder that it is in.

    Args:
        source: a checkpoint, a run's directory, or the folder of its checkpoints.
        which: "last" or "best".
        beside: where this process may put what it fetches, and which part that is; None: in a folder of its own, all of it.

    Raises:
        RunError: there is no checkpoint.
    """
    url = url_of(source)
    if url is None:
        elsewhere = recorded_directory(Path(source))
        if elsewhere is not None:
            return checkpoint_at(elsewhere, which, beside)
        path = checkpoint_in(source, which)
        return Disk(path.parent, beside.part if isinstance(beside, Disk) else (0, 1)), path.name
    here, rank, part = None if beside is None else beside.here, 0, (0, 1)
    if isinstance(beside, Bucket):
        rank, part = beside.rank, beside.part
    elif beside is not None:
        rank, part = beside.part[0], share_of_machine(*beside.part)
    above, _, last = url.rpartition("/")
    if step_of(last) is not None:
        return Bucket(above, here, rank, part), last
    bucket = Bucket(url, here, rank, part)
    name = bucket.pointed(which)
    there = bucket.names() if name is None else []
    if name is None:
        more = f" There are {', '.join(there)}; give one of them." if there else ""
        raise RunError(f"{url} has no {which!r} checkpoint.{more}{unless_known(which)}")
    return bucket, name


def recorded_directory(run_dir: Path) -> str | None:
    """Return where a run that does not keep its checkpoints in its own directory has them; None for others, and where its `run.json` is damaged."""
    file = run_dir / "run.json"
    try:
        saves = read_record(file)["settings"].get("checkpoint") if file.is_file() else None
    except (RunError, AttributeError):
        return None
    directory = saves.get("directory") if isinstance(saves, dict) else None
    return str(directory) if directory is not None else None


def checkpoint_in(source: str | Path, which: str = "last") -> Path:
    """Return the checkpoint that a path means: itself, or the last or best of a run's directory.

    Raises:
        RunError: there is no checkpoint.
    """
    path = Path(source)
    if (path / MANIFEST).is_file():
        return path.resolve()
    for candidate in (path / "checkpoints" / which, path / which):
        if (candidate / MANIFEST).is_file():
            return candidate.resolve()
    there = [saved.path.name for saved in committed(Disk(path / "checkpoints"))] if path.is_dir() else []
    if there:
        link = path / "checkpoints" / which
        reason = unless_known(which) or ("was `monitor` set?" if which == "best" else "the link was lost.")
        if link.is_symlink():
            reason = f"{link.readlink()}, which it is, has no {MANIFEST}."
        raise RunError(
            f"{path} has no {which!r} checkpoint: {reason.strip()} There are {', '.join(there)} in {path / 'checkpoints'}; give one of them."
        )
    if not path.exists():
        hint = ' To go on where run_dir stopped, set resume="auto".' if str(source).lower() == "auto" else ""
        raise RunError(
            f"There is no file or folder {path}{'' if path.is_absolute() else f' in {Path.cwd()}'}. Give a checkpoint or a run's directory.{hint}"
        )
    raise RunError(f"{path} holds no checkpoint. Give a run's directory or one of its checkpoints/step-... folders.")


def unless_known(which: str) -> str:
    """Return what `which` may be, where it is something else."""
    return "" if which in ("best", "last") else ' which is "best", "last" or a step-... that is there.'


def load_model(
    model: nn.Module, stored: Weights, extra: dict[str, Any], source: Path, *, strict: bool = True, has_all: bool = True
) -> None:
    """Load weights by name, each rank its part.

    Args:
        model: takes them, in place; it is not touched before all is read.
        stored: the tensors.
        extra: what a model's `get_extra_state` adds.
        source: where they are from.
        strict: raise an error where something does not fit; otherwise warn of it, and load the rest.
        has_all: whether the model has all layers; else those of other ranks are not superfluous.

    Raises:
        RunError: names, shapes or kinds of numbers differ; all of them are listed. Or, if not strict, nothing fits.
    """
    own, there = model.state_dict(), {*stored, *extra}
    tied = tied_names(model, there)
    missing = [name for name in own if name not in there and name not in tied]
    more = sorted(there - own.keys()) if has_all else []
    misfits = {name: why for name, value in own.items() if (why := misfit(stored, name, value)) is not None}
    if missing or more or misfits:
        lines = [f"  not in {source.name}: {', '.join(missing)}"] * bool(missing)
        lines += [f"  not in the model: {', '.join(more)}"] * bool(more)
        lines += [f"  {name} is {why}" for name, why in misfits.items()]
        hint = suggested_rename(
            {name: shape_or_none(own[name]) for name in missing},
            {name: stored.shape(name) if name in stored else None for name in more},
        )
        said = "\n".join(lines) + (f"\n{hint} makes most of these names fit." if hint is not None else "")
        if strict:
            raise RunError(
                f"The weights in {source} are of another model:\n{said}\nBuild the model as it was, or load what fits with "
                "sheer.load_weights(model, source, strict=False); a resumed run starts anew in another run_dir."
            )
        if not any(name in stored and name not in misfits for name in own):
            raise RunError(f"Nothing in {source} fits the model, so nothing is loaded:\n{said}")
        warnings.warn(f"Not all of the weights in {source} are loaded:\n{said}", SheerWarning, stacklevel=user_level())
    with torch.no_grad():
        state = {
            name: stored.like(name, value)
            if isinstance(value, Tensor) and name in stored and name not in misfits
            else extra.get(name, value)
            for name, value in own.items()
        }
        model.load_state_dict(state)


def shape_or_none(value: Any) -> tuple[int, ...] | None:
    """Return a tensor's shape; None for what is no tensor."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def misfit(stored: Weights, name: str, value: Any) -> str | None:
    """Return why a tensor that is stored under a name does not fit there; None: it does, or there is none."""
    if not isinstance(value, Tensor) or name not in stored:
        return None
    if tuple(value.shape) != stored.shape(name):
        return f"{list(value.shape)} here and {list(stored.shape(name))} there"
    here, numbers = numbers_in_tensor(value), stored.numbers(name)
    return f"{here} here and {numbers} there" if here != numbers else None


def tied_names(model: nn.Module, names: Collection[str]) -> set[str]:
    """Return the names of parameters that are the same as one of these names; Hugging Face writes such a weight once."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    present = {id(parameter) for name, parameter in parameters if name in names}
    return {name for name, parameter in parameters if id(parameter) in present}
