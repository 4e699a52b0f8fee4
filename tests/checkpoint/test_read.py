"""Parts of tensors: which overlap."""

from __future__ import annotations

import itertools
import random

import torch

from sheer.checkpoint.read import do_overlap


def test_boxes_overlap_where_a_count_of_each_place_says_so() -> None:
    numbers, found = random.Random(0), set()
    for _ in range(400):
        boxes = []
        for _ in range(numbers.randint(1, 4)):
            low = [numbers.randint(0, 4) for _ in range(2)]
            boxes.append((low, [a + numbers.randint(1, 3) for a in low]))
        counts = torch.zeros(8, 8)
        for (a, b), (c, d) in boxes:
            counts[a:c, b:d] += 1
        assert do_overlap(boxes) == bool((counts > 1).any()), boxes
        found.add(do_overlap(boxes))
    assert found == {True, False}


def test_the_parts_of_many_ranks_do_not() -> None:
    grid = [([a, b], [a + 1, b + 8]) for a, b in itertools.product(range(128), range(0, 64, 8))]
    random.Random(0).shuffle(grid)
    assert not do_overlap(grid)
    assert do_overlap([*grid, ([0, 0], [1, 1])])
