"""Weights that others wrote: safetensors in a file or a Hugging Face folder, and pickled state_dicts, which are read without running code."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sheer.checkpoint.disk import step_of
from sheer.checkpoint.read import Stored
from sheer.checkpoint.store import MANIFEST
from sheer.distributed.tensors import divided_like
from sheer.errors import RunError, SettingsError

PICKLED = (".ckpt", ".pt", ".pth", ".bin")  # what torch.save writes, Lightning's checkpoints among them
INDEX = "model.safetensors.index.json"  # of a Hugging Face folder with several files


class Weights(Protocol):
    """Tensors by name, each read when it is asked for, whole or in this rank's part."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object, /) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""

    def numbers(self, name: str) -> str:
        """Return which numbers a tensor holds: `float`, `complex` or `int`."""

    def like(self, name: str, pattern: Tensor) -> Tensor:
        """Return a tensor, or this rank's part of it, divided as `pattern` is."""


class InMemory:
    """Tensors that are in memory, all of them on every rank."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return tuple(self.tensors[name].shape)

    def numbers(self, name: str) -> str:
        """Return which numbers a tensor holds: `float`, `complex` or `int`."""
        return numbers_in_tensor(self.tensors[name])

    def like(self, name: str, pattern: Tensor) -> Tensor:
        """Return a tensor, or this rank's part of it, divided as `pattern` is."""
        return divided_like(self.tensors[name], pattern)


def numbers_in_tensor(tensor: Tensor) -> str:
    """Return which numbers a tensor holds: `float`, `complex` or `int`."""
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "int"


class Renamed:
    """Tensors under other names.

    Args:
        weights: the tensors under their own names.
        patterns: regular expressions and what they are replaced by, one after the other, in each name.

    Raises:
        RunError: two tensors get the same name.
    """

    def __init__(self, weights: Weights, patterns: Mapping[str, str]) -> None:
        self.weights = weights
        self.names: dict[str, str] = {}  # the own name of each
        for name in weights:
            new = renamed(name, patterns)
            if new in self.names:
                raise RunError(
                    f"rename makes {new!r} of both {self.names[new]!r} and {name!r}. Make a pattern narrower."
                )
            self.names[new] = name

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return self.weights.shape(self.names[name])

    def numbers(self, name: str) -> str:
        """Return which numbers a tensor holds: `float`, `complex` or `int`."""
        return self.weights.numbers(self.names[name])

    def like(self, name: str, pattern: Tensor) -> Tensor:
        """Return a tensor, or this rank's part of it, divided as `pattern` is."""
        return self.weights.like(self.names[name], pattern)


def renamed(name: str, patterns: Mapping[str, str]) -> str:
    """Return a name with regular expressions replaced in it, one after the other.

    Raises:
        SettingsError: one is no regular expression.
    """
    for pattern, replacement in patterns.items():
        try:
            name = re.sub(pattern, replacement, name)
        except (re.error, TypeError, IndexError) as error:
            raise SettingsError(
                f'rename={{{pattern!r}: {replacement!r}}} is no pattern and its replacement: {error}. Give such as {{r"^encoder\\.": "backbone."}}.'
            ) from error
    return name


def refuse_unmatched(names: Sequence[str], patterns: Mapping[str, str], source: Path) -> None:
    """Raise `SettingsError` where a pattern, when its turn comes, matches no name."""
    for pattern, replacement in patterns.items():
        after = [renamed(name, {pattern: replacement}) for name in names]
        if names and not any(re.search(pattern, name) for name in names):
            more = ", ..." if len(names) > 5 else ""
            raise SettingsError(
                f"rename={{{pattern!r}: {replacement!r}}} matches no name in {source}. Patterns are taken one after the other, and at its turn there are: "
                f"{', '.join(names[:5])}{more}."
            )
        names = after


def suggested_rename(missing: Mapping[str, object], more: Mapping[str, object]) -> str | None:
    """Return the `rename` by which names that are superfluous become most of those that are missing, if a prefix is all that differs.

    Args:
        missing: the names that are missing, with their shapes.
        more: those that are superfluous, with theirs.
    """
    pairs = {heads_of(wanted, name) for wanted in list(missing)[:5] for name in more} - {None}
    counts = {}
    for pair in pairs:
        here, there = pair or ("", "")
        made = {here + name.removeprefix(there): shape for name, shape in more.items() if name.startswith(there)}
        counts[here, there] = sum(name in missing and missing[name] == shape for name, shape in made.items())
    if not counts or 2 * max(counts.values()) < len(missing):
        return None
    here, there = max(sorted(counts), key=counts.__getitem__)
    return f'rename={{r"^{there.replace(".", chr(92) + ".")}": "{here}"}}'


def heads_of(name: str, other: str) -> tuple[str, str] | None:
    """Return what two names begin with, up to where they go on alike; None: they do not end alike."""
    ends, others = name.split("."), other.split(".")
    while ends and others and ends[-1] == others[-1]:
        ends.pop()
        others.pop()
    if len(ends) == name.count(".") + 1:
        return None
    return "".join(f"{part}." for part in ends), "".join(f"{part}." for part in others)


def foreign_weights(path: Path) -> tuple[Weights, dict[str, Any]] | None:
    """Return the weights of a file, or of a Hugging Face folder, and what else `get_extra_state` gave; None: it is neither.

    Raises:
        RunError: it cannot be read, or only by running code from it.
    """
    if path.is_file() and path.suffix in PICKLED:
        return unpickled(path)
    if path.name.endswith(".index.json"):
        return Stored(shards_of(path)), {}
    if path.is_file():
        return Stored([path]), {}
    is_ours = (path / MANIFEST).exists() or step_of(path.resolve().name) is not None
    if not is_ours and (path / INDEX).is_file():
        return Stored(shards_of(path / INDEX)), {}
    if not is_ours and (path / "model.safetensors").is_file():
        return Stored([path / "model.safetensors"]), {}
    return None


def shards_of(index: Path) -> list[Path]:
    """Return the files that the index of a Hugging Face folder names.

    Raises:
        RunError: it is damaged, or names what is not beside it.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        strange = [name for name in names if Path(name).name != name or name in ("", "..")]
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RunError(f"{index} is no index of safetensors files, or a damaged one: {error!r}.") from error
    if strange:
        raise RunError(f"{index} names {strange[0]!r}, which is no file beside it.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise RunError(
            f"{index} names {', '.join(missing) or 'no files'}, which {'is' if missing else 'are'} not there."
        )
    return [index.parent / name for name in names]


def unpickled(path: Path) -> tuple[InMemory, dict[str, Any]]:
    """Return the tensors that `torch.save` wrote, alone or as the `state_dict` of a Lightning checkpoint, and what else was among them.

    Raises:
        RunError: it holds more than tensors and plain values, or is damaged, or has no state_dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a file that is damaged on purpose raises what it likes
        built = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)", str(error))
        if built is not None:
            raise RunError(
                f"{path} holds a {built[1] or built[2]}, and to make one could run code: nothing is loaded. Where you trust the file, take the weights out "
                'once: there = torch.load(path, weights_only=False), and torch.save(there.state_dict(), "weights.pt") where it is a whole model, '
                'torch.save(there["state_dict"], "weights.pt") where it is a dict.'
            ) from error
        reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise RunError(
            f"{path} is nothing that torch.save wrote, or damaged{reason}. Give what torch.save(model.state_dict(), path) wrote; a file of "
            "safetensors is to be named .safetensors."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        there = (
            f"a dict of {', '.join(map(str, list(content)[:8]))}"
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise RunError(
            f"{path} holds {there}, and weights are tensors by name, or such a dict under 'state_dict'. Save model.state_dict()."
        )
    strange = [name for name in state if not isinstance(name, str)]
    if strange:
        raise RunError(f"{path} holds {strange[0]!r} as the name of a weight, and names are texts.")
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    return InMemory(tensors), {name: value for name, value in state.items() if not isinstance(value, Tensor)}
