"""Going back on a GPU, where batches are copied ahead and saves are staged in pinned memory: run by hand with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from tests.rollback import Step, plain, progress_of, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("bad", [[(0, 1)], [(1, 3)], [(1, 6), (2, 0)]])
def test_the_run_is_one_that_never_saw_the_bad_batches(bad: list[tuple[int, int]]) -> None:
    left, by_hand = run("run", Step(bad), device="cuda"), plain(bad, device="cuda")
    assert left["step"] == by_hand["step"] and progress_of("run")["rollbacks"] == len(bad)
    for name, value in by_hand["weights"].items():
        assert torch.equal(left["weights"][name], value), name
    for line, other in zip(left["lines"], by_hand["lines"], strict=True):
        assert (line["step"], line["epoch"]) == (other["step"], other["epoch"])
        assert line["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)
