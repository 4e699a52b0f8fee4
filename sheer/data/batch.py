"""What is done to a batch, whatever it is made of: move it, count it, cut it, describe it."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from sheer.errors import DataError


class StepBatch(list[tuple[Any, int]]):
    """What one step trains on: the loader's batches (several with `accumulate_grad_batches`), each with its number of samples.

    Attributes:
        total: the samples of the step, those of other ranks counted in.
        largest: for each batch the most samples that a rank has of it.
    """

    total: int = 0
    largest: Sequence[int] = ()

    def holding(self, parts: Iterable[tuple[Any, int]]) -> StepBatch:
        """Return a step that holds other parts, and is the same otherwise."""
        step = StepBatch(parts)
        step.total, step.largest = self.total, self.largest
        return step


def move(value: Any, device: torch.device, dtype: torch.dtype | None = None, pin: bool = False) -> Any:
    """Return `value` with all tensors in it on `device`, and the floating ones as `dtype` if one is given.

    An object that has `.to` moves itself; mappings, sequences, named tuples and dataclasses are walked; anything else stays
    as it is, and lists of plain numbers stay on the host. `pin` copies through pinned memory, so that the host need not wait.
    """
    if isinstance(value, Tensor):
        if pin and value.device.type == "cpu":
            value = value.pin_memory()
        if dtype is not None and value.is_floating_point():
            return value.to(device, dtype, non_blocking=True)
        return value.to(device, non_blocking=True)
    if isinstance(value, PackedSequence):  # a named tuple that must not be taken apart
        return _packed(value, device, dtype)
    if hasattr(value, "to") and not isinstance(value, type):
        return value.to(device)
    if isinstance(value, Mapping):
        moved = {key: move(item, device, dtype, pin) for key, item in value.items()}
        return moved if type(value) is dict else _rebuilt(value, moved)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(item, device, dtype, pin) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(move(item, device, dtype, pin) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: move(getattr(value, f.name), device, dtype, pin) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value


def _packed(value: PackedSequence, device: torch.device, dtype: torch.dtype | None) -> PackedSequence:
    """Move the data and the orders of a packed sequence; its batch sizes stay on the host, where they must be."""
    given = (value.sorted_indices, value.unsorted_indices)
    orders = [None if order is None else order.to(device) for order in given]
    return PackedSequence(value.data.to(device, dtype), value.batch_sizes, *orders)


def _rebuilt(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Return a mapping of the same class with other values; a plain dict where the class cannot be built from one."""
    kind: Any = type(mapping)
    try:
        return kind(items)
    except TypeError:
        return items


def count_samples(batch: Any) -> int:
    """Count the samples of a batch: the leading dimension of the first tensor in it, 1 where there is none."""
    first = next(tensors_in(batch), None)
    if isinstance(first, PackedSequence):
        return int(first.batch_sizes[0])
    return first.shape[0] if first is not None and first.dim() > 0 else 1


def tensors_in(value: Any) -> Iterator[Tensor | PackedSequence]:
    """Yield the tensors in a batch, in order."""
    if isinstance(value, (Tensor, PackedSequence)):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def fingerprint(batch: Any) -> int | None:
    """Return a number that tells the tensors of a batch from others; None where it holds none."""
    marks = [
        zlib.crc32(value.detach().cpu().numpy().tobytes()) for value in tensors_in(batch) if isinstance(value, Tensor)
    ]
    return hash(tuple(marks)) if marks else None


def same_tensors(one: Any, other: Any) -> bool:
    """Whether two batches hold tensors, and the same ones."""
    pairs = list(itertools.zip_longest(tensors_in(one), tensors_in(other)))
    return bool(pairs) and all(isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs)


def micro_batches(batch: list[tuple[Any, int]], size: int) -> Iterator[tuple[Any, int]]:
    """Cut the batches of a step into micro-batches of at most `size` samples, each with its number of samples."""
    for part, samples in batch:
        for start in range(0, max(samples, 1), size):  # one without samples is run all the same, and counts for nothing
            stop = min(start + size, samples)
            yield (part if stop - start == samples else cut(part, samples, start, stop)), stop - start


def cut(value: Any, samples: int, start: int, stop: int) -> Any:
    """Return samples `start` to `stop` of a batch of `samples`.

    Tensors, lists and tuples that are `samples` long are cut; mappings, other tuples and lists, and dataclasses are walked;
    single values are kept whole.

    Raises:
        DataError: something in the batch holds samples and cannot be cut.
    """
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return value
        if value.shape[0] == samples:
            return value[start:stop]
        raise DataError(
            f"micro_batch_size cannot cut a tensor of shape {list(value.shape)} in a batch of {samples} samples: its first "
            "dimension does not count the samples. Give the loader a smaller batch_size and set accumulate_grad_batches instead."
        )
    if isinstance(value, (str, bytes, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields") and _holds_samples(value, samples):
        return value[start:stop]
    if isinstance(value, PackedSequence):
        raise DataError(
            "micro_batch_size cannot cut a PackedSequence. Give the loader a smaller batch_size and set accumulate_grad_batches instead."
        )
    if isinstance(value, Mapping):
        parts = {key: cut(item, samples, start, stop) for key, item in value.items()}
        return parts if type(value) is dict else _rebuilt(value, parts)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cut(item, samples, start, stop) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(cut(item, samples, start, stop) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: cut(getattr(value, f.name), samples, start, stop) for f in dataclasses.fields(value) if f.init
        }
        return dataclasses.replace(value, **fields)
    raise DataError(
        f"micro_batch_size cannot cut a {type(value).__name__}. Give the loader a smaller batch_size and set "
        "accumulate_grad_batches instead, or return tensors, lists, mappings or dataclasses from the loader."
    )


def _holds_samples(values: Sequence[Any], samples: int) -> bool:
    """Whether a list is one item a sample (strings, numbers, tensors of any size).

    As many tensors as samples, each with as many rows, could be either; they are taken for a few tensors of samples.
    """
    if len(values) != samples:
        return False
    return not all(isinstance(item, Tensor) and item.dim() > 0 and item.shape[0] == samples for item in values)


def describe(value: Any) -> str:
    """Say what a batch is made of in one line: `(float32 [64, 64], int64 [64])`."""
    if isinstance(value, StepBatch):
        return " + ".join(describe(part) for part, _ in value)
    if isinstance(value, Tensor):
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{place}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)) and len(value) <= 8:
        inside = ", ".join(describe(item) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = ", ".join(
            f"{field.name}={describe(getattr(value, field.name))}" for field in dataclasses.fields(value)
        )
        return f"{type(value).__name__}({inside})"
    return type(value).__name__
