"""A step that runs out of memory is done again in smaller micro-batches, as if they had been so from the start."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

import sheer
from sheer.random import Before, state_before
from tests.ranks import run_on_ranks
from tests.task import assert_same, loader, trainer
from tests.task import model as model_with_norm


def model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))


class Limited:
    """A step that runs out of memory for more than `most` samples, from its `after`-th call on."""

    def __init__(self, most: int, after: int = 0, where: str = "forward") -> None:
        self.most, self.after, self.where, self.sizes = most, after, where, list[int]()

    def __call__(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        self.sizes.append(len(x))
        full = len(x) > self.most and len(self.sizes) > self.after
        if full and self.where == "before anything":
            raise torch.OutOfMemoryError("no memory")
        loss = F.mse_loss(net(x), y)
        if full and self.where == "forward":
            raise torch.OutOfMemoryError("no memory")
        if full and self.where == "backward":
            loss = Full.apply(loss)
        return {"loss": loss, "size": torch.tensor(float(len(x)))}


class Full(torch.autograd.Function):
    """Runs out of memory as its backward pass begins."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")


def fitted(step: Any, make: Callable[[], nn.Module] = model, **settings: Any) -> dict[str, Tensor]:
    net = make()
    settings = {"max_steps": 12, "log_every_n_steps": 4, "run_dir": f"run-{len(list(Path().iterdir()))}", **settings}
    torch.manual_seed(5)
    trainer(**settings).fit(net, step, loader(16), optimizer=SGD(net.parameters(), lr=0.05, momentum=0.9))
    return net.state_dict()


def logged(run_dir: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("time", "train/size")} for line in lines]


@pytest.mark.parametrize("where", ["before anything", "forward", "backward"])
def test_the_result_is_that_of_smaller_micro_batches_from_the_start(
    where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = Limited(5, where=where)
    weights = fitted(limited, run_dir="halved")
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert_same(weights, fitted(Limited(1000), run_dir="small", micro_batch_size=4))
    assert logged("halved") == logged("small")
    assert limited.sizes[:6] == [16, 8, 4, 4, 4, 4] and max(limited.sizes[2:]) == 4
    assert said == [
        "out of memory at step 1: micro-batches of 8 instead of 16 from here on; the global batch stays 16",
        "out of memory at step 1: micro-batches of 4 instead of 8 from here on; the global batch stays 16",
    ]


def test_a_step_that_no_graph_makes_is_done_again_too() -> None:
    """Here there is no device for a graph; tests/gpu/test_out_of_memory_on_a_gpu.py has both."""
    weights = fitted(Limited(5), run_dir="halved", cuda_graph=True)
    assert_same(weights, fitted(Limited(1000), run_dir="small", micro_batch_size=4))


def test_what_the_first_micro_batches_of_the_step_added_is_taken_back() -> None:
    settings = {"accumulate_grad_batches": 2, "max_epochs": 4, "max_steps": None, "log_every_n_steps": 3}
    fails_in_the_second_batch_of_step_3 = Limited(8, after=5)
    weights = fitted(fails_in_the_second_batch_of_step_3, run_dir="halved", **settings)
    plain = Limited(1000)
    assert fails_in_the_second_batch_of_step_3.sizes[:7] == [16, 16, 16, 16, 16, 16, 8]
    fitted(plain, run_dir="whole", **settings)
    for ours, theirs in zip(logged("halved"), logged("whole"), strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-5) for name, value in theirs.items()}
    assert all(weight.isfinite().all() for weight in weights.values())


def test_the_step_is_done_again_from_the_same_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's generator is put back, which a step on a device may draw from: here that step is on the CPU, for which none is kept."""

    def state_on_a_device(device: torch.device) -> Before:
        assert state_before(device) is None
        return Before(device)

    monkeypatch.setattr("sheer.start.state_before", state_on_a_device)

    def with_dropout() -> nn.Module:
        return nn.Sequential(model(), nn.Dropout(0.5))

    drawn = fitted(Limited(8, after=3, where="forward"), with_dropout)
    not_drawn = fitted(Limited(8, after=3, where="before anything"), with_dropout)
    assert_same(drawn, not_drawn)


def test_where_one_sample_does_not_fit_the_error_says_what_is_left() -> None:
    with pytest.raises(torch.OutOfMemoryError) as raised:
        fitted(Limited(0))
    assert any("Not one sample fits" in note for note in raised.value.__notes__)


def test_an_evaluation_that_does_not_fit_is_told_what_helps_there() -> None:
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trainer(max_steps=1, micro_batch_size=8).fit(
            net := model(), Limited(8), loader(16), loader(16), optimizer=SGD(net.parameters(), lr=0.1)
        )
    notes = " ".join(raised.value.__notes__)
    assert "give that a smaller batch_size" in notes and "set micro_batch_size" not in notes


def test_a_batch_that_cannot_be_cut_says_why() -> None:
    def step(net: nn.Module, batch: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    net = model()
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trainer(max_steps=1).fit(
            net, step, [(torch.ones(4, 6), torch.ones(3, 1))], optimizer=SGD(net.parameters(), lr=0.1)
        )
    assert any("micro_batch_size cannot cut" in note for note in raised.value.__notes__)


def test_the_size_is_kept_when_the_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    whole = fitted(Limited(8), max_steps=8, run_dir="whole")
    fitted(Limited(8), max_steps=4, run_dir="run", resume="auto", checkpoint=True)
    resumed = Limited(1000)
    weights = fitted(resumed, max_steps=8, run_dir="run", resume="auto", checkpoint=True)
    assert "micro-batches of at most 8, since memory ran out before" in capsys.readouterr().out
    assert max(resumed.sizes) == 8
    assert_same(weights, whole)


def test_what_depends_on_the_size_of_micro_batches_is_warned_of() -> None:
    with pytest.warns(sheer.SheerWarning, match="batch norms: their statistics are over smaller micro-batches"):
        fitted(Limited(8), model_with_norm, max_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", sheer.SheerWarning)
        fitted(Limited(8), max_steps=2)


def on_ranks(
    most: list[int], where: str, buffers: bool = False, parallel: str = "ddp"
) -> tuple[list[int], list[float]]:
    limited = Limited(most[int(os.environ["RANK"])], after=1, where=where)
    net = model().double()
    if buffers:
        net.register_buffer("seen", torch.zeros(1, dtype=torch.float64))
    settings: dict[str, Any] = {"max_steps": 6, "log_every_n_steps": 3, "precision": "64-true", "parallel": parallel}
    trainer(run_dir=f"run-{len(most)}", **settings).fit(
        net, limited, loader(16), optimizer=SGD(net.parameters(), lr=0.05)
    )
    return limited.sizes, torch.cat([p.detach().flatten() for p in net.parameters()]).tolist()


def test_one_of_two_ranks_runs_out_and_all_take_its_size_from_the_next_log_point_on() -> None:
    (sizes, weights), (others, same) = run_on_ranks(2, on_ranks, [1000, 4], "forward")
    _, whole = run_on_ranks(1, on_ranks, [1000], "forward")[0]
    assert weights == same
    assert weights == pytest.approx(whole, rel=1e-12)
    assert others == [8, 8, *[4, 4] * 5]
    assert sizes == [8, 8, 8, *[4, 4] * 3]


@pytest.mark.parametrize(
    ("where", "buffers", "parallel"),
    [("backward", False, "ddp"), ("forward", True, "ddp"), ("forward", False, "fsdp")],
)
def test_where_the_others_wait_for_what_was_to_be_sent_all_end_with_an_error(
    where: str, buffers: bool, parallel: str
) -> None:
    with pytest.raises(AssertionError, match="The other ranks wait for what this one was to send"):
        run_on_ranks(2, on_ranks, [1000, 4], where, buffers, parallel)


def test_ranks_that_capture_graphs_together_are_told_the_size() -> None:
    """One of them would capture its smaller parts alone, and NCCL would wait for the others."""
    from types import SimpleNamespace

    from sheer.data.batch import StepBatch
    from sheer.memory import refusal_of

    run: Any = SimpleNamespace(ranks=object(), graphs=object(), graphless=None)
    why = refusal_of(run, StepBatch([(torch.ones(8, 1), 8)]), 8, 4, torch.OutOfMemoryError("no memory"))
    assert why is not None and "Set micro_batch_size=4" in why and "capture their graphs together" in why
