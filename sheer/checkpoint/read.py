"""Checkpoints read back: tensors from the files of however many ranks, whole or in the part that this rank holds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sheer.checkpoint.codec import decode
from sheer.checkpoint.layout import Part, part_of
from sheer.checkpoint.store import file_of
from sheer.distributed.tensors import is_divided_tensor
from sheer.errors import RunError


class Stored(Mapping[str, Tensor]):
    """The tensors in some safetensors files, by name; ranks may have written parts of them. Nothing is read before it is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self._places: dict[str, list[tuple[Any, Part]]] = {}  # for each name the files that have parts of it
        for file in files:
            try:
                self._open(file)
            except (
                SafetensorError,
                OSError,
                LookupError,
                TypeError,
                ValueError,
                AttributeError,
                RecursionError,
            ) as error:
                raise RunError(f"{file} is no safetensors file, or a damaged one: {error}.") from error

    def _open(self, file: Path) -> None:
        handle: Any = safe_open(file, framework="pt")
        parts = json.loads((handle.metadata() or {}).get("parts", "{}"))
        names: list[str] = handle.keys()
        for key in names:
            sizes = tuple(handle.get_slice(key).get_shape())
            begins, shape = parts.get(key, ([0] * len(sizes), sizes))
            part = Part(tuple(begins), tuple(shape))
            inside = all(isinstance(number, int) for number in (*part.begins, *part.shape)) and all(
                0 <= a <= n - m for a, m, n in zip(part.begins, sizes, part.shape, strict=True)
            )
            places = self._places.setdefault(key, [])
            if not inside or (places and places[0][1].shape != part.shape):
                raise ValueError(f"{key!r} is no part of one tensor of a shape {list(shape)}")
            places.append((handle, part))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return self._places[name][0][1].shape

    def kind(self, name: str) -> str:
        """Return the data type of a tensor as safetensors calls it, such as `BF16`."""
        return str(self._places[name][0][0].get_slice(name).get_dtype())

    def numbers(self, name: str) -> str:
        """Return which numbers a tensor holds: `float`, `complex` or `int`."""
        return {"F": "float", "B": "float", "C": "complex"}.get(self.kind(name).replace("BOOL", "I")[0], "int")

    def count_parts(self, name: str) -> int:
        """Return in how many parts a tensor was written."""
        return len(self._places[name])

    def __getitem__(self, name: str) -> Tensor:
        """Return a whole tensor."""
        shape = self.shape(name)
        return self._box(name, [0] * len(shape), shape)

    def like(self, name: str, pattern: Tensor) -> Tensor:
        """Return a tensor, or this rank's part of it, divided as `pattern` is, which has its shape; nothing is sent."""
        if not is_divided_tensor(pattern):
            return self[name]
        from torch.distributed.tensor import DTensor

        divided, part = cast(Any, pattern), part_of(pattern)
        begins = [0] * pattern.dim() if part is None else part.begins
        own = self._box(name, begins, tuple(divided.to_local().shape)).to(divided.to_local().device)
        return DTensor.from_local(
            own,
            divided.device_mesh,
            divided.placements,
            run_check=False,
            shape=pattern.shape,
            stride=pattern.stride(),
        )

    def _box(self, name: str, begins: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return a box of a tensor, put together from the parts that there are.

        Raises:
            RunError: parts are missing.
        """
        places = self._places[name]
        if len(places) == 1 and tuple(sizes) == self.shape(name) and not any(places[0][1].begins):
            stored_whole: Tensor = places[0][0].get_tensor(name)
            if tuple(stored_whole.shape) == tuple(sizes):
                return stored_whole
        pieces = []
        for handle, part in places:
            stored = handle.get_slice(name)
            low = [max(a, b) for a, b in zip(begins, part.begins, strict=True)]
            ends = [
                min(a + n, b + m) for a, n, b, m in zip(begins, sizes, part.begins, stored.get_shape(), strict=True)
            ]
            if all(a < b for a, b in zip(low, ends, strict=True)):
                pieces.append((stored, part, low, ends))
        boxes = [(low, ends) for _, _, low, ends in pieces]
        filled = sum(math.prod(b - a for a, b in zip(low, ends, strict=True)) for low, ends in boxes)
        if filled != math.prod(sizes) or do_overlap(boxes):
            raise RunError(
                f"{self.files[0].parent} has {filled} of the {math.prod(sizes)} numbers wanted of {name!r}, or some twice: it is incomplete."
            )
        out: Tensor | None = None
        for stored, part, low, ends in pieces:
            piece = stored[tuple(slice(a - b, c - b) for a, b, c in zip(low, part.begins, ends, strict=True))]
            out = torch.empty(tuple(sizes), dtype=piece.dtype) if out is None else out
            out[tuple(slice(a - b, c - b) for a, b, c in zip(low, begins, ends, strict=True))] = piece
        return out if out is not None else torch.empty(tuple(sizes), dtype=places[0][0].get_tensor(name).dtype)


def do_overlap(boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether any two boxes, each given by where it begins and ends in every dimension, have a place in common."""
    if len(boxes) < 2:
        return False
    counts = [len(set(begins)) for begins in zip(*(low for low, _ in boxes), strict=True)]
    along = counts.index(max(counts))  # the dimension that parts most
    reaching: list[tuple[Sequence[int], Sequence[int]]] = []  # boxes that do not end before this one begins
    for _, low, ends in sorted((low[along], low, ends) for low, ends in boxes):
        reaching = [box for box in reaching if box[1][along] > low[along]]
        for other, last in reaching:
            if all(a < d and c < b for a, b, c, d in zip(low, ends, other, last, strict=True)):
                return True
        reaching.append((low, ends))
    return False


def stored_in(path: Path, manifest: Mapping[str, Any], group: str) -> Stored:
    """Return the tensors of a group of a checkpoint."""
    pattern = re.compile(rf"{group}(-\d+-of-\d+)?\.safetensors")
    return Stored([path / name for name in sorted(filter(pattern.fullmatch, manifest["files"]))])


class Later:
    """A tensor of a checkpoint that is read when it is known which part of it is wanted."""

    def __init__(self, stored: Stored, name: str) -> None:
        self.stored, self.name = stored, name

    def like(self, pattern: Tensor) -> Tensor:
        """Return it, divided as `pattern` is where it has the same shape, else whole."""
        if self.stored.shape(self.name) == tuple(pattern.shape):
            return self.stored.like(self.name, pattern)
        return self.stored[self.name]


class AllLater:
    """The tensors of a group, each to be read later."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Later:
        if name not in self.stored:
            raise KeyError(name)
        return Later(self.stored, name)


def read_state(path: Path, manifest: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return the state that a rank wrote; the tensors of its optimizers are to be read later.

    Raises:
        RunError: it is not what a save writes.
    """
    name = file_of("state", rank, manifest["world_size"])
    if f"{name}.json" not in manifest["files"]:
        raise RunError(f"{path} is incomplete: its manifest does not name {name}.json.")
    stored, optimized = stored_in(path, manifest, name), stored_in(path, manifest, "optimizer")
    try:
        state: dict[str, Any] = json.loads((path / f"{name}.json").read_text())
        optimizers = decode(state.pop("optimizers", {}), AllLater(optimized))
        state = {**decode(state, dict(stored)), "optimizers": optimizers}
        check_state(state, rank in manifest["leads"], is_first=rank == 0)
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else repr(error)
        raise RunError(f"{path / name}.json is not what a save writes: {reason}.") from error
    return state


def check_state(state: Mapping[str, Any], leads: bool, *, is_first: bool) -> None:
    """Raise `LookupError` or `TypeError` where a rank's state has not the entries that are read from it; the first has those of all."""
    mappings = {"random", *(("extra", "optimizers") if leads else ())}
    mappings |= {"progress", "schedulers", "scheduler_classes", "callbacks", "loggers"} if is_first else set()
    missing = (mappings | {"data", "metrics"} | ({"scheduled_steps", "scaler"} if is_first else set())) - state.keys()
    if missing:
        raise LookupError(f"{', '.join(sorted(missing))} missing")
    strange = [name for name in (*mappings, "role") if not isinstance(state.get(name, {}), dict)]
    if strange:
        raise TypeError(f"{', '.join(sorted(strange))} no mapping")
    for name, optimizer in state["optimizers"].items() if leads else ():
        groups, states = optimizer["groups"], optimizer["state"].values()
        if not all(isinstance(group["params"], list) for group in groups):
            raise TypeError(f"the groups of the optimizer {name!r} name no parameters")
        if not all(isinstance(values, dict) for values in states):
            raise TypeError(f"the state of the optimizer {name!r} is not by parameter")


def read_shared_state(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that rank 0 wrote, with what ranks that hold other layers wrote of their own."""
    first, *others = [read_state(path, manifest, rank) for rank in manifest["leads"]]
    for other in others:
        first["extra"] |= other["extra"]
        for name, optimizer in other["optimizers"].items():
            first["optimizers"][name]["state"] |= optimizer["state"]
            for group, more in zip(first["optimizers"][name]["groups"], optimizer["groups"], strict=True):
                group["params"] += more["params"]
    return first
