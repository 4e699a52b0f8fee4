"""Documents of any length in rows of one length: each is seen by itself, and hardly a place is empty."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sheer.errors import DataError

NO_TARGET = -100  # what F.cross_entropy, and linear_cross_entropy, leave out


class Packed(Dataset[dict[str, Tensor]]):
    """Rows of `length` tokens that documents are packed into: a map-style dataset, to be shuffled and divided as any other.

    The longest are placed first, each in the fullest row that still has room for it (best fit, decreasing). Which documents share
    a row depends on nothing but their lengths, so it is the same in each epoch and on any rank; a loader shuffles the rows. A
    document of more than `length` + 1 tokens is cut into parts that are documents of their own: the first token of a part is the
    last one that the part before it predicts, so every token but a document's first is predicted once. A document of one token,
    or of none, has nothing to predict, and is left out; one whose length is given as 1 is not read.

    A row is a mapping of tensors of [length], int64:

    - tokens: the documents, one behind the other; `pad` where there is none.
    - targets: the token that follows in the same document; -100 where there is none.
    - positions: of each token in its document, from 0 on.
    - documents: a number for each document of the row, from 0 on; the empty places are the last one.

    and, for attention of variable length, starts: where these documents begin, [the most that a row has], int32; filled up with
    `length`. Tokens attend to those of the same document alone with `sheer.document_mask(batch["documents"])` and its companions.

    Args:
        documents: anything with a length and items that are one-dimensional: tensors, arrays, lists of tokens.
        length: tokens in a row.
        lengths: tokens in each document, at least 1, where they are known; otherwise each document is read once, now.
        pad: the token that stands in empty places.

    Attributes:
        fill: the share of places that hold a token, from 0 to 1.
        most_documents: the most documents in one row, empty places counted as one.

    Raises:
        DataError: there is nothing to pack, a document is no sequence of whole numbers, or `lengths` are no lengths, or those of
            other documents.
    """

    def __init__(
        self, documents: Sequence[Any], length: int, *, lengths: Iterable[int] | None = None, pad: int = 0
    ) -> None:
        if length < 1:
            raise DataError(f"Packed needs rows of at least 1 token, not {length}.")
        if isinstance(documents, Mapping) or not hasattr(documents, "__len__"):
            raise DataError(
                f"Packed was given a {type(documents).__name__}, and it needs all documents with their number: a list, an array or a "
                "map-style dataset, each item the token ids of one document."
            )
        counts = np.asarray(
            [count_tokens(documents[index], index) for index in range(len(documents))]
            if lengths is None
            else list(lengths),
            np.int64,
        )
        if len(counts) != len(documents):
            raise DataError(f"There are {len(documents)} documents, and {len(counts)} lengths were given.")
        if lengths is not None and len(counts) and counts.min() < 1:
            raise DataError(
                f"lengths[{int(np.argmax(counts < 1))}] is {counts[counts < 1][0]}, and each is to be the number of tokens in a document, at least 1. Leave "
                "empty documents out; where lengths are not known, leave `lengths` out, and each document is read once."
            )
        self.documents, self.length, self.pad, self._counts = documents, length, pad, counts
        self._document, self._start, self._size = cut_documents(counts - 1, length)
        if len(self._size) == 0:
            raise DataError("Packed was given no document of two tokens or more, so there is nothing to predict.")
        row_of = best_fit(self._size.tolist(), length)
        order, self._rows = by_rows(row_of)
        self._document, self._start, self._size = self._document[order], self._start[order], self._size[order]
        sums = np.add.reduceat(self._size, self._rows[:-1])
        self.fill = float(self._size.sum() / (len(self) * length))
        self.most_documents = int((np.diff(self._rows) + (sums < length)).max())

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} rows, and row {index} was asked for.")
        tokens = torch.full((self.length,), self.pad)
        targets = torch.full((self.length,), NO_TARGET)
        positions, numbers = torch.zeros(self.length, dtype=torch.int64), torch.zeros(self.length, dtype=torch.int64)
        starts = torch.full((self.most_documents,), self.length, dtype=torch.int32)
        pieces = range(self._rows[index], self._rows[index + 1])
        at = 0
        for number, piece in enumerate(pieces):
            first, size = int(self._start[piece]), int(self._size[piece])
            text = self._read(int(self._document[piece]), first, first + size + 1)
            place = slice(at, at + size)
            tokens[place], targets[place], numbers[place] = text[:-1], text[1:], number
            positions[place] = torch.arange(size)
            starts[number] = at
            at += size
        if at < self.length:
            numbers[at:] = len(pieces)
            starts[len(pieces)] = at
        return {"tokens": tokens, "targets": targets, "positions": positions, "documents": numbers, "starts": starts}

    def _read(self, number: int, start: int, stop: int) -> Tensor:
        """Return a part of a document, which must be as long as it was when it was packed."""
        document = self.documents[number]
        count, expected = count_tokens(document, number), int(self._counts[number])
        if count != expected:
            raise DataError(
                f"Document {number} has {count} tokens, and it was packed as one of {expected}. Its length must stay what it was, or what "
                "`lengths` said."
            )
        return whole_numbers(document, number, start, stop)


def count_tokens(document: Any, number: int) -> int:
    """Return the length of a document.

    Raises:
        DataError: it is no sequence of token ids, as far as its first item tells.
    """
    if isinstance(document, Mapping):
        key = "input_ids" if "input_ids" in document else next(iter(document), "tokens")
        raise DataError(
            f"Document {number} is a mapping of {', '.join(map(repr, document)) or 'nothing'}, and a document is a 1-D sequence of token ids. Take "
            f"them out of it: Packed([item[{key!r}] for item in dataset], ...)."
        )
    if isinstance(document, (str, bytes, set, frozenset)) or not hasattr(document, "__getitem__"):
        raise no_token_ids(number, f"a {type(document).__name__}")
    if not isinstance(document, (list, tuple)) and len(getattr(document, "shape", (0,))) != 1:
        raise no_token_ids(number, f"a {type(document).__name__} of {len(document.shape)} dimensions")
    whole_numbers(document, number, 0, 1)
    return len(document)


def whole_numbers(document: Any, number: int, start: int, stop: int) -> Tensor:
    """Return a part of a document as int64.

    Raises:
        DataError: it does not hold whole numbers in one dimension.
    """
    part = document[start:stop]
    if isinstance(part, Tensor):
        if len(part) and (part.is_floating_point() or part.is_complex() or part.dtype == torch.bool):
            raise no_token_ids(number, f"of {part.dtype}")
        return part.to("cpu", torch.int64)
    try:
        values = np.array(part)  # a copy: what a file is mapped to must not be written
    except ValueError as error:  # items of several lengths
        raise no_token_ids(number, f"a {type(document).__name__} of sequences") from error
    if values.ndim != 1:
        raise no_token_ids(number, f"of {values.ndim} dimensions")
    if len(values) and values.dtype.kind not in "iu":
        raise no_token_ids(number, f"of {type(part[0]).__name__ if values.dtype.kind == 'O' else values.dtype}")
    return torch.from_numpy(values.astype(np.int64, copy=False))


def no_token_ids(number: int, found: str) -> DataError:
    """Build the error for a document that is something else."""
    return DataError(
        f"Document {number} is {found}, and a document is a 1-D sequence of token ids, which are whole numbers: a list, an array or a tensor of "
        "integers. Tokenize text before it is packed, and put tokens that come one by one into a list."
    )


def cut_documents(sizes: Any, length: int) -> tuple[Any, Any, Any]:
    """Return the document, the first token and the size of all parts of at most `length` of documents with so many predictions each."""
    parts = np.maximum(-(-sizes // length), 0)
    document = np.repeat(np.arange(len(sizes)), parts)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)) * length
    return document, start, np.minimum(sizes[document] - start, length)


def best_fit(sizes: Sequence[int], capacity: int) -> list[int]:
    """Return the row that each size is placed in: the largest first, each where the least room is left that it fits in."""
    row_of, rows = [0] * len(sizes), 0
    with_room: dict[int, list[int]] = {}  # rows, by what room they have
    rooms: list[int] = []  # the keys of `with_room`, in order
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[index]
        place = bisect.bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        else:
            room, row, rows = capacity, rows, rows + 1
        row_of[index] = row
        if room > size:
            if room - size not in with_room:
                bisect.insort(rooms, room - size)
            with_room.setdefault(room - size, []).append(row)
    return row_of


def by_rows(row_of: Sequence[int]) -> tuple[Any, Any]:
    """Return the order that brings the parts of each row together, rows by their first part, and where each row begins in it."""
    rows = np.asarray(row_of)
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    order = np.argsort(first[inverse], kind="stable")
    counts = np.bincount(inverse)[np.argsort(first)]
    return order, np.concatenate([[0], np.cumsum(counts)])
