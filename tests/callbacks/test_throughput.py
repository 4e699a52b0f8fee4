"""Throughput: what is counted, what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import sheer
from sheer.callbacks import throughput
from sheer.callbacks.throughput import peak_by_name
from tests.task import assert_same, loader, loss_step, model, step, trainer
from tests.test_resume import assert_equal, run


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def logged(monkeypatch: pytest.MonkeyPatch, callback: sheer.Throughput, **settings: Any) -> list[dict[str, Any]]:
    """Train 7 steps of 16, 16, ..., 4 samples: a step takes 2 seconds, a validation 100, a save 1,000."""
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)

    def pass_time(amount: float) -> Any:
        def function(*arguments: Any) -> None:
            clock.now += amount

        return function

    before = sheer.On(evaluation_end=pass_time(0))
    slow = sheer.On(update=pass_time(2), save=pass_time(1000), evaluation_start=pass_time(100))
    first = [before, callback, slow] if "checkpoint" not in settings else [slow, callback]
    net = nn.Linear(6, 1)
    optimizer = SGD(net.parameters(), lr=0.01)
    trainer(callbacks=first, max_epochs=1, log_every_n_steps=3, run_dir="run", **settings).fit(
        net, step, loader(shuffle=False), loader(50), optimizer=optimizer
    )
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def test_samples_and_steps_a_second_without_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = logged(monkeypatch, sheer.Throughput(), validate_every_n_steps=2)
    assert [line["throughput/samples_per_second"] for line in lines] == [8.0, 8.0, 2.0]
    assert [line["throughput/steps_per_second"] for line in lines] == [0.5, 0.5, 0.5]
    assert "throughput/mfu" not in lines[0] and "throughput/tokens_per_second" not in lines[0]


def test_saving_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = logged(monkeypatch, sheer.Throughput(), checkpoint=sheer.Checkpoint(every_n_steps=1), limit_val_batches=0)
    assert [line["throughput/samples_per_second"] for line in lines] == [8.0, 8.0, 2.0]


@pytest.mark.parametrize(
    "tokens", [10, lambda batch: 10 * len(batch[0]), lambda batch: torch.tensor(10 * len(batch[0]))]
)
def test_tokens_by_number_or_function(monkeypatch: pytest.MonkeyPatch, tokens: Any) -> None:
    lines = logged(monkeypatch, sheer.Throughput(tokens=tokens))
    assert [line["throughput/tokens_per_second"] for line in lines] == [80.0, 80.0, 20.0]


def test_tokens_by_the_key_of_a_batch() -> None:
    assert throughput.tokens_of("ids", {"ids": torch.zeros(4, 7)}, 4) == 28


def test_utilisation_from_given_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = logged(monkeypatch, sheer.Throughput(flops_per_sample=1e6, peak_flops=16e6))
    assert [line["throughput/mfu"] for line in lines] == [0.5, 0.5, 0.125]


def test_flops_are_counted_once_and_the_run_stays_the_same() -> None:
    trained = []
    for callbacks in ([], [sheer.Throughput(flops_per_sample="count", peak_flops=1e9)]):
        net = model()
        torch.manual_seed(0)
        trainer(callbacks=callbacks).fit(net, step, loader(), optimizer=AdamW(net.parameters(), lr=1e-2))
        trained.append(net.state_dict())
    assert_same(trained[0], trained[1])
    # two layers of 6 x 16 and 16 x 1, a multiply and an add each; backward twice that, but for the input's own gradient
    assert callbacks[0].state_dict() == {"flops_per_sample": 2 * (6 * 16 + 16) * 2 + 2 * 16}


def test_flops_are_not_counted_again_in_the_run_that_goes_on() -> None:
    made: list[sheer.Throughput] = []

    def callbacks() -> list[Any]:
        made.append(sheer.Throughput(flops_per_sample="count", peak_flops=1e9))
        return [made[-1]]

    run("stopped", stop_at=5, make_callbacks=callbacks)
    resumed = run("stopped", make_callbacks=callbacks)
    assert made[0].state_dict() == made[1].state_dict()
    assert_equal(resumed["weights"], run("whole", make_callbacks=callbacks)["weights"])


def test_a_mode_of_torch_is_left_also_after_an_error() -> None:
    def bad(net: nn.Module, batch: Any) -> Any:
        raise ZeroDivisionError

    net = nn.Linear(6, 1)
    with pytest.raises(ZeroDivisionError):
        trainer(callbacks=[sheer.Throughput(flops_per_sample="count", peak_flops=1.0)]).fit(
            net, bad, loader(), optimizer=SGD(net.parameters())
        )
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_peaks_by_the_name_of_the_device() -> None:
    assert peak_by_name("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_by_name("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_by_name("NVIDIA H100 PCIe") == 756e12
    assert peak_by_name("NVIDIA L40S") == 362e12
    assert peak_by_name("NVIDIA GH200 480GB") == 989.4e12
    with pytest.raises(sheer.SettingsError, match="Give peak_flops"):
        peak_by_name("NVIDIA GeForce GTX 970")


def test_an_unknown_peak_and_a_compiled_model_are_refused_at_the_start() -> None:
    net = nn.Linear(6, 1)
    for callback, settings, match in (
        (sheer.Throughput(flops_per_sample=1.0), {}, "does not know the peak of 'cpu'"),
        (sheer.Throughput(flops_per_sample="count", peak_flops=1.0), {"compile": True}, "compiled model"),
    ):
        with pytest.raises(sheer.SettingsError, match=match):
            trainer(callbacks=[callback], device="cpu", **settings).fit(
                net, loss_step, loader(), optimizer=SGD(net.parameters())
            )
