"""Sequences that several ranks share: which part is whose, and where its tokens stand.

Causal attention would give the rank with the last part most of the work. So a sequence is cut into twice as many chunks as there are
ranks, and rank r of n holds chunks r and 2n - 1 - r: an early and a late one, together the same work everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sheer.data.batch import describe, tensors_in
from sheer.distributed.mesh import Ranks
from sheer.errors import DataError, ModelError


def cut_sequence(batch: Any, seq_dim: int, cp_rank: int, cp_size: int) -> Any:
    """Return this rank's part of each sequence in a batch: chunks `cp_rank` and `2 * cp_size - 1 - cp_rank` of `2 * cp_size`.

    Tensors with a dimension `seq_dim` are cut along it and must be equally long there; those without stay whole, as does all that is
    no tensor. Mappings, sequences, named tuples and dataclasses are walked. Targets of a language model are shifted before, not
    after: the token that follows the last one of a chunk is another rank's.

    Args:
        batch: whatever the loader gives.
        seq_dim: the dimension that counts the tokens: 1 for [batch, time, ...].
        cp_rank, cp_size: the place of this rank among those that share the sequence, and how many they are.

    Raises:
        DataError: a sequence that does not divide, or sequences of different lengths.
    """
    if cp_size == 1:
        return batch
    return _cut_part(batch, seq_dim, cp_rank, cp_size, [])


def _cut_part(value: Any, seq_dim: int, cp_rank: int, cp_size: int, lengths: list[int]) -> Any:
    """Cut what `cut_sequence` is given; `lengths` holds the length that the first sequence had."""
    where = (seq_dim, cp_rank, cp_size, lengths)
    if isinstance(value, Tensor):
        if value.dim() <= seq_dim:
            return value
        lengths.append(value.shape[seq_dim])
        if lengths[0] != lengths[-1]:
            raise DataError(
                f"A tensor of shape {list(value.shape)} is {lengths[-1]} long in dimension {seq_dim}, where another of the same batch is "
                f"{lengths[0]} long, so which of them is the sequence cannot be known. Context parallelism cuts every tensor that has a "
                f"dimension {seq_dim}: pad them to one length, or give what is no sequence another shape."
            )
        return own_chunks(value, seq_dim, cp_rank, cp_size)
    if isinstance(value, PackedSequence):
        raise DataError("Context parallelism cannot cut a PackedSequence. Pad the sequences to one length instead.")
    if isinstance(value, Mapping):
        parts, kind = {key: _cut_part(item, *where) for key, item in value.items()}, cast(Any, type(value))
        try:
            return kind(parts)
        except TypeError:  # a mapping that cannot be made of another
            return parts
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cut_part(item, *where) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_cut_part(item, *where) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _cut_part(getattr(value, f.name), *where) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value


def own_chunks(tensor: Tensor, seq_dim: int, cp_rank: int, cp_size: int) -> Tensor:
    """Return the two chunks of a tensor that are this rank's, one behind the other.

    Raises:
        DataError: the tensor does not divide into twice as many chunks as there are ranks.
    """
    length = tensor.shape[seq_dim]
    if length == 0 or length % (2 * cp_size):
        raise DataError(
            f"A sequence of {length} (dimension {seq_dim} of a tensor of shape {list(tensor.shape)}) cannot be shared by {cp_size} "
            f"ranks: each takes two chunks of equal length, so it must be a multiple of {2 * cp_size}. Pad or cut the sequences to "
            f"{-(-max(length, 1) // (2 * cp_size)) * 2 * cp_size}, or set cp to another number of ranks."
        )
    chunk = length // (2 * cp_size)
    early = tensor.narrow(seq_dim, cp_rank * chunk, chunk)
    late = tensor.narrow(seq_dim, (2 * cp_size - 1 - cp_rank) * chunk, chunk)
    return torch.cat([early, late], dim=seq_dim)


@contextmanager
def sharded_buffers(
    model: nn.Module, names: Sequence[str], seq_dims: Sequence[int], length: int, cp_rank: int, cp_size: int
) -> Iterator[None]:
    """Give named buffers of a model only this rank's part of their sequence, for the time of a step, backward included.

    For tables of positions (cosines and sines of rotary embeddings, position ids) that the model cuts to the length of its input:
    `self.cos[: x.shape[1]]` then has the rows of this rank's tokens. It helps only where the model takes the first rows; one that
    indexes with positions wants the whole table, and positions in the batch, where they are cut with the tokens. A learned table (a parameter) cannot be given this way.

    Args:
        model: the model that holds the buffers.
        names: their names, as in `named_buffers`: "rope.cos".
        seq_dims: for each, the dimension that counts the positions.
        length: the length of the whole sequences of this step.
        cp_rank, cp_size: the place of this rank among those that share the sequence, and how many they are.

    Raises:
        ModelError: there is no such buffer, or it is shorter than the sequence.
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, seq_dim in zip(names, seq_dims, strict=True):
        if name not in buffers:
            raise ModelError(
                f"The model has no buffer {name!r} whose positions could be shared. Its buffers: {list(buffers)}."
            )
        if buffers[name].dim() <= seq_dim or buffers[name].shape[seq_dim] < length:
            raise ModelError(
                f"The buffer {name!r} of shape {list(buffers[name].shape)} does not hold {length} positions in dimension {seq_dim}. Make it "
                "at least as long as the sequences, or name the dimension that counts the positions."
            )
    try:
        for name, seq_dim in zip(names, seq_dims, strict=True):
            _set_buffer(model, name, own_chunks(buffers[name].narrow(seq_dim, 0, length), seq_dim, cp_rank, cp_size))
        yield
    finally:
        for name in names:
            _set_buffer(model, name, buffers[name])


def own_sequences(batch: Any, ranks: Ranks) -> Any:
    """Return this rank's part of the sequences in a batch, where ranks share them."""
    parallel = ranks.parallel
    return batch if parallel.seq_dim is None else cut_sequence(batch, parallel.seq_dim, ranks.place("cp"), parallel.cp)


@contextmanager
def sharing_sequences(model: nn.Module, ranks: Ranks, batches: Sequence[Any]) -> Iterator[None]:
    """Let attention see the whole of the sequences that ranks share, and a model's buffers hold the positions of this rank's part.

    Args:
        model: whose buffers are meant.
        ranks: who shares, and what.
        batches: this rank's parts of those of a step; they tell how long the sequences are.

    Raises:
        DataError: they are of different lengths, and buffers are to be cut to one.
    """
    parallel = ranks.parallel
    if parallel.cp == 1 or parallel.seq_dim is None:
        yield
        return
    from sheer.distributed.context import attention_over

    dims = [0] * len(parallel.cp_buffers)
    lengths = {parallel.cp * length_of_sequences(batch, parallel.seq_dim) for batch in batches}
    if len(lengths) > 1 and dims:
        raise DataError(
            f"The batches of a step hold sequences of {', '.join(map(str, sorted(lengths)))}, and cp_buffers are cut to one length a step. Pad them "
            "to one, or set accumulate_grad_batches=1."
        )
    length = max(lengths)
    with (
        attention_over(ranks.group("cp")),
        sharded_buffers(model, parallel.cp_buffers, dims, length, ranks.place("cp"), parallel.cp),
    ):
        yield


def length_of_sequences(batch: Any, seq_dim: int) -> int:
    """Return how long the sequences in a batch are.

    Raises:
        DataError: no tensor in it has that dimension.
    """
    for tensor in tensors_in(batch):
        if isinstance(tensor, Tensor) and tensor.dim() > seq_dim:
            return tensor.shape[seq_dim]
    raise DataError(f"seq_dim={seq_dim} is no dimension of any tensor in the batch: {describe(batch)}.")


def _set_buffer(model: nn.Module, name: str, buffer: Tensor) -> None:
    owner, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(owner), own_name, buffer)
