"""What there is to see of checkpoints: lists, trees of what is inside, differences of two, and plain copies of their weights."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sheer.checkpoint.bucket import Folder
from sheer.checkpoint.disk import step_of
from sheer.checkpoint.read import Stored, stored_in
from sheer.checkpoint.store import MANIFEST, file_of, manifest_from
from sheer.errors import RunError

TYPE_WORDS = {
    "F": "float",
    "BF": "bfloat",
    "I": "int",
    "U": "uint",
    "C": "complex",
}  # safetensors' words, and PyTorch's
GROUPS = ("model", "training", "optimizer")
NOT_COMPARED = ("progress/seconds", "loggers/")  # they tell of the clock, and of files beside the checkpoint


@dataclass(frozen=True)
class Row:
    """A checkpoint in a list."""

    name: str
    step: int
    size: int  # of all its files, in bytes
    when: float | None  # its commit, in seconds since 1970; None: there was none
    metrics: Mapping[str, Any]
    marks: tuple[str, ...]  # which links point at it
    wrong: str | None  # what is wrong with it; None: it is whole, as far as sizes tell


def rows_of(disk: Folder) -> list[Row]:
    """Return what is in a folder of checkpoints, in the order of their steps. Hashes are not computed."""
    links = {link: disk.pointed(link) for link in ("last", "best")}
    return [list_row(disk, name, tuple(link for link in links if links[link] == name)) for name in disk.names()]


def list_row(disk: Folder, name: str, marks: tuple[str, ...]) -> Row:
    """Return a checkpoint's line of a list."""
    text, sizes = disk.read(name, MANIFEST), disk.sizes(name)
    step, size = (step_of(name) or (0, 0))[0], sum(sizes.values())
    if text is None:
        return Row(name, step, size, None, {}, marks, "its save was cut off")
    when = disk.when(name, MANIFEST)
    try:
        manifest = manifest_from(text, name, name)
    except RunError as error:
        return Row(name, step, size, when, {}, marks, str(error))
    differing = [file for file, facts in manifest["files"].items() if sizes.get(file) != facts["size"]]
    wrong = f"damaged: {', '.join(differing)} missing or of another size" if differing else None
    return Row(name, step, size, when, manifest["metrics"], marks, wrong)


def type_of(kind: str) -> str:
    """Return PyTorch's word for a data type of safetensors: `float32` for `F32`."""
    match = re.fullmatch(r"(BF|[FIUC])(\d+)(.*)", kind)
    return f"{TYPE_WORDS[match[1]]}{match[2]}{match[3].lower()}" if match else kind.lower()


def bytes_of(stored: Stored, name: str) -> int:
    """Return how many bytes a whole tensor has."""
    bits = re.search(r"\d+", stored.kind(name))
    return math.prod(stored.shape(name)) * (int(bits[0]) if bits is not None else 8) // 8


def described_tensor(stored: Stored, name: str) -> str:
    """Return the data type and the shape of a tensor, and in how many parts it was written."""
    parts = stored.count_parts(name)
    return f"{type_of(stored.kind(name))} {list(stored.shape(name))}" + (f" in {parts} parts" if parts > 1 else "")


def groups_in(path: Path, manifest: Mapping[str, Any]) -> dict[str, Stored]:
    """Return the tensors of a checkpoint: of the model and the optimizers, and of the state of each rank."""
    groups = {group: stored_in(path, manifest, group) for group in GROUPS}
    for rank in range(manifest["world_size"]):
        file = f"{file_of('state', rank, manifest['world_size'])}.safetensors"
        if file in manifest["files"]:
            groups[f"state of rank {rank}" if rank else "state"] = Stored([path / file])
    return {group: stored for group, stored in groups.items() if stored}


def numbers_of(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and texts in the state of a checkpoint, by their paths."""
    found: dict[str, Any] = {}
    for rank in range(manifest["world_size"]):
        file = f"{file_of('state', rank, manifest['world_size'])}.json"
        if file in manifest["files"]:
            found |= leaves(read_json(path / file), f"rank {rank}" if rank else "")
    return found


def read_json(file: Path) -> Any:
    """Read a file of JSON.

    Raises:
        RunError: it is none.
    """
    try:
        return json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged: {error}.") from error


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield what is in nested lists and dicts, with its path; the codec's own marks are no part of it, nor are tensors."""
    pending = [(path, value)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict) and "$tensor" in value:
            continue
        if not isinstance(value, (dict, list)) or not value:
            yield path, value
            continue
        items = value.items() if isinstance(value, dict) else enumerate(value)
        inner = [
            (path if str(key).startswith("$") else f"{path}/{key}" if path else str(key), item) for key, item in items
        ]
        pending += reversed(inner)


@dataclass(frozen=True)
class Differing:
    """A tensor that differs between two checkpoints."""

    name: str  # with its group
    in_both: bool
    largest: float  # the largest difference of two numbers; infinite where they cannot be compared
    relative: float  # the same over the largest number
    said: str


def differing_tensors(a: Mapping[str, Stored], b: Mapping[str, Stored], told: Callable[[], None]) -> list[Differing]:
    """Return which tensors differ, those with the largest difference first; `told` is called behind each."""
    found = []
    for group in dict.fromkeys([*a, *b]):
        ones: Mapping[str, Tensor] = a.get(group, {})
        others: Mapping[str, Tensor] = b.get(group, {})
        for name in dict.fromkeys([*ones, *others]):
            if name not in ones or name not in others:
                found.append(
                    Differing(f"{group}: {name}", False, math.inf, math.inf, f"only in {'A' if name in ones else 'B'}")
                )
            else:
                difference = difference_of(f"{group}: {name}", ones[name], others[name])
                found += [difference] if difference is not None else []
            told()
    return sorted(found, key=_by_size)


def _by_size(difference: Differing) -> tuple[bool, float, str]:
    return (not difference.in_both, -difference.largest, difference.name)


def difference_of(name: str, one: Tensor, other: Tensor) -> Differing | None:
    """Compare two tensors; None: they are equal bit for bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        shown = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (one, other)]
        return Differing(name, True, math.inf, math.inf, f"{shown[0]} in A, {shown[1]} in B")
    if torch.equal(raw_bytes(one), raw_bytes(other)):
        return None
    wide = torch.complex128 if one.is_complex() else torch.float64
    before, after = one.to(wide), other.to(wide)
    both_nan = before.isnan() & after.isnan()
    largest = (before - after).abs().masked_fill(both_nan, 0.0).nan_to_num(nan=math.inf, posinf=math.inf).max().item()
    scale = before.abs().max().item()
    return Differing(name, True, largest, largest / scale if scale > 0 else math.inf, f"{list(one.shape)}")


def raw_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's memory as bytes, in one dimension."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def differing_numbers(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the paths of numbers and texts that differ, or that only one has."""
    return [
        path
        for path in dict.fromkeys([*a, *b])
        if not path.startswith(NOT_COMPARED)
        and (path not in a or path not in b or a[path] != b[path] or type(a[path]) is not type(b[path]))
    ]


def write_whole(stored: Stored, out: Path, told: Callable[[int], None]) -> None:
    """Write tensors into one safetensors file, each whole, with no more than one of them in memory.

    Args:
        stored: the tensors.
        out: the file; it is there whole or not at all.
        told: is called with the number of bytes that were written.
    """
    heads: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in stored:
        start, end = end, end + bytes_of(stored, name)
        heads[name] = {"dtype": stored.kind(name), "shape": list(stored.shape(name)), "data_offsets": [start, end]}
    text = json.dumps(heads).encode()
    text += b" " * (-len(text) % 8)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in stored:
                content = raw_bytes(stored[name]).numpy()
                stream.write(content.data)
                told(content.nbytes)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
