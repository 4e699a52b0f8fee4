"""The weights of a checkpoint, and the way into a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sheer.checkpoint.store import MANIFEST, committed, read_tensors, verify
from sheer.errors import RunError


def load_weights(model: nn.Module, source: str | Path, which: str = "best", *, strict: bool = True) -> Path:
    """Load the weights of a run or checkpoint into a model, and return the checkpoint they are from.

    Args:
        model: takes the weights, in place.
        source: a run's directory, a checkpoint's directory, or a safetensors file.
        which: of a run's directory, "best" or "last".
        strict: raise an error where names are missing or superfluous; shapes must fit in any case.

    Raises:
        RunError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    path = Path(source)
    if path.is_file():
        from safetensors.torch import load_file

        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"{path} is no safetensors file, or a damaged one: {error}. Give a run's directory, a checkpoint's, or a .safetensors file."
            ) from error
        load_model(model, state, path, strict=strict)
        return path
    path = checkpoint_in(path, which)
    verify(path)
    load_model(model, dict(read_tensors(path, "model")), path, strict=strict)
    return path


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
    there = [saved.path.name for saved in committed(path / "checkpoints")] if path.is_dir() else []
    if there:
        reason = "was `monitor` set?" if which == "best" else "the link was lost."
        raise RunError(
            f"{path} has no {which!r} checkpoint: {reason} There are {', '.join(there)} in {path / 'checkpoints'}; give one of them."
        )
    raise RunError(f"{path} holds no checkpoint. Give a run's directory or one of its checkpoints/step-... folders.")


def load_model(model: nn.Module, state: dict[str, Any], source: Path, *, strict: bool = True) -> None:
    """Load weights by name.

    Raises:
        RunError: names or shapes differ, and `strict`; all of them are listed.
    """
    own = model.state_dict()
    missing, more = [name for name in own if name not in state], sorted(name for name in state if name not in own)
    shapes = [
        f"{name} is {list(value.shape)} here and {list(state[name].shape)} there"
        for name, value in own.items()
        if isinstance(value, Tensor) and isinstance(state.get(name), Tensor) and value.shape != state[name].shape
    ]
    if shapes or (strict and (missing or more)):
        lines = [f"  not in {source.name}: {', '.join(missing)}"] * bool(missing)
        lines += [f"  not in the model: {', '.join(more)}"] * bool(more)
        lines += [f"  {line}" for line in shapes]
        raise RunError(f"The weights in {source} are of another model:\n" + "\n".join(lines))
    with torch.no_grad():
        model.load_state_dict(state, strict=strict)
