"""Documents of any length in rows of one length: each is seen by itself, and hardly a place is empty."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
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
    last one that the part before it predicts, so every token but a document's first is predicted once. Documents of fewer than
    two tokens have nothing to predict, and are left out.

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
        lengths: tokens in each document, where they are known; otherwise each document is read once, now.
        pad: the token that stands in empty places.

    Attributes:
        fill: the share of places that hold a token, from 0 to 1.
        most_documents: the most documents in one row, empty places counted as one.

    Raises:
        DataError: there is nothing to pack, or `lengths` are those of other documents.
    """

    def __init__(
        self, documents: Sequence[Any], length: int, *, lengths: Iterable[int] | None = None, pad: int = 0
    ) -> None:
        if length < 1:
            raise DataError(f"Packed needs rows of at least 1 token, not {length}.")
        counts = np.asarray(
            [len(documents[index]) for index in range(len(documents))] if lengths is None else list(lengths), np.int64
        )
        if len(counts) != len(documents):
            raise DataError(f"There are {len(documents)} documents, and {len(counts)} lengths were given.")
        self.documents, self.length, self.pad = documents, length, pad
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
            text = whole_numbers(self.documents[int(self._document[piece])], first, first + size + 1)
            if len(text) != size + 1:
                raise DataError(
                    f"Document {int(self._document[piece])} ends at token {first + len(text)}, and when it was packed it had {first + size + 1} at "
                    "least. Its length must stay what it was, or what `lengths` said."
                )
            place = slice(at, at + size)
            tokens[place], targets[place], numbers[place] = text[:-1], text[1:], number
            positions[place] = torch.arange(size)
            starts[number] = at
            at += size
        if at < self.length:
            numbers[at:] = len(pieces)
            starts[len(pieces)] = at
        return {"tokens": tokens, "targets": targets, "positions": positions, "documents": numbers, "starts": starts}


def whole_numbers(document: Any, start: int, stop: int) -> Tensor:
    """Return a part of a document as int64."""
    part = document[start:stop]
    if isinstance(part, Tensor):
        return part.to("cpu", torch.int64)
    return torch.from_numpy(np.array(part, np.int64))  # a copy: what a file is mapped to must not be written


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
