"""Batches of any nesting: moved, counted, cut, described."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from sheer.data.batch import StepBatch, count_samples, cut, describe, micro_batches, move
from sheer.errors import DataError

META = torch.device("meta")
Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Graph:
    nodes: Tensor
    name: str


class Moves:
    """An object that moves itself."""

    def __init__(self) -> None:
        self.to_device: Any = None

    def to(self, device: torch.device) -> Moves:
        self.to_device = device
        return self


def test_move_walks_every_kind_of_container() -> None:
    x = torch.zeros(2, 3)
    batch = {"pair": Pair(x, [x, "text"]), "graph": Graph(x, "g"), "own": Moves(), "numbers": [1, 2], "none": None}
    moved = move(batch, META)
    assert moved["pair"].x.device == META and moved["pair"].y[0].device == META and moved["pair"].y[1] == "text"
    assert moved["graph"].nodes.device == META and moved["graph"].name == "g"
    assert moved["own"].to_device == META
    assert moved["numbers"] == [1, 2] and moved["none"] is None
    assert x.device.type == "cpu"


def test_move_converts_floating_tensors_only() -> None:
    moved = move((torch.zeros(2), torch.zeros(2, dtype=torch.long)), torch.device("cpu"), torch.bfloat16)
    assert [part.dtype for part in moved] == [torch.bfloat16, torch.long]


def test_a_packed_sequence_is_moved_whole_and_its_sizes_stay_on_the_host() -> None:
    packed = pack_sequence([torch.zeros(3), torch.zeros(1)])
    moved = move({"series": packed}, torch.device("cpu"), torch.float64)["series"]
    assert isinstance(moved, PackedSequence)
    assert moved.data.dtype == torch.float64 and moved.batch_sizes.device.type == "cpu"


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(5, 2), 5),
        ((torch.zeros(4), torch.zeros(9)), 4),
        ({"name": ["a", "b"], "x": torch.zeros(3)}, 3),
        ([[], {"deep": (torch.zeros(6),)}], 6),
        (pack_sequence([torch.zeros(3), torch.zeros(1)]), 2),
        (torch.tensor(1.0), 1),
        ("text", 1),
        (Graph(torch.zeros(7), "g"), 7),
    ],
)
def test_samples_are_counted_by_the_first_tensor(batch: Any, samples: int) -> None:
    assert count_samples(batch) == samples


def test_micro_batches_cut_what_holds_samples_and_keep_the_rest() -> None:
    batch = {
        "x": torch.arange(5),
        "names": list("abcde"),
        "pair": (torch.arange(5), torch.arange(10).view(5, 2)),
        "weight": 0.5,
    }
    parts = list(micro_batches(StepBatch([(batch, 5)]), 2))
    assert [samples for _, samples in parts] == [2, 2, 1]
    first, _, last = (part for part, _ in parts)
    assert first["x"].tolist() == [0, 1] and first["names"] == ["a", "b"] and first["weight"] == 0.5
    assert first["pair"][1].shape == (2, 2) and last["pair"][0].tolist() == [4]


def test_two_tensors_of_two_samples_are_cut_each_not_taken_apart() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2)
    part = cut([x, y], 2, 0, 1)
    assert [tuple(item.shape) for item in part] == [(1, 3), (1,)]


def test_a_list_of_one_tensor_a_sample_is_cut_by_samples() -> None:
    images = [torch.zeros(3, size) for size in (4, 5, 6, 7)]
    assert [image.shape[1] for image in cut(images, 4, 1, 3)] == [5, 6]


@pytest.mark.parametrize("batch", [pack_sequence([torch.zeros(3), torch.zeros(1)]), torch.zeros(3, 2), Moves()])
def test_what_cannot_be_cut_is_refused_with_the_way_out(batch: Any) -> None:
    with pytest.raises(DataError, match="accumulate_grad_batches"):
        cut(batch, 2, 0, 1)


def test_a_batch_is_described_in_a_line() -> None:
    batch = {"x": torch.zeros(2, 3), "rest": (torch.zeros(2, dtype=torch.long), "text")}
    assert describe(batch) == "{'x': float32 [2, 3], 'rest': (int64 [2], str)}"
