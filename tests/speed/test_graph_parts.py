"""The parts of `cuda_graph` that can be shown without a GPU. The graphs themselves are in tests/gpu/test_graph.py."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

import sheer
from sheer.distributed.mesh import Ranks
from sheer.metrics import Metrics
from sheer.nonfinite import Watch
from sheer.random import snapshot
from sheer.speed.graph import refuse_host_randomness, why_not
from sheer.speed.rates import DeviceRates
from sheer.speed.record import CannotCaptureError, Recorder, leaves_of
from tests.task import assert_same, loader, model, step, trainer


def test_without_a_gpu_the_run_says_so_and_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    nets = model(), model()
    for net, on in zip(nets, (True, False), strict=True):
        torch.manual_seed(0)
        trainer(device="cpu", cuda_graph=on, max_steps=9).fit(net, step, loader(), optimizer=SGD(net.parameters(), 0.1))
    assert_same(nets[0].state_dict(), nets[1].state_dict())
    assert "cuda_graph: steps are made without a graph, for there is no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_graphs_in_graphs_are_refused(mode: Any) -> None:
    with pytest.raises(sheer.SettingsError, match="makes CUDA graphs of its own"):
        sheer.Trainer(max_steps=1, cuda_graph=True, compile=mode)


def test_anomaly_detection_is_refused() -> None:
    with pytest.raises(sheer.SettingsError, match="detect_anomaly looks at each value"):
        sheer.Trainer(max_steps=1, cuda_graph=True, detect_anomaly=True)


def test_ones_own_loop_is_told_that_it_has_no_graphs() -> None:
    net = model()
    with pytest.warns(sheer.SheerWarning, match="a loop of your own are made without"):
        trainer(cuda_graph=True, max_steps=1).start(net, optimizers={"sgd": SGD(net.parameters(), 0.1)}).finish()


def stepped(net: nn.Module, optimizer: Any, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        net(torch.ones(3, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def test_rates_are_tensors_in_updates_and_numbers_for_schedulers() -> None:
    """As one who gives the optimizer tensors, and fills them before each update."""
    net = nn.Linear(6, 2)
    net.load_state_dict(start := {name: value.clone() for name, value in net.state_dict().items()})
    optimizer = AdamW(net.parameters(), lr=0.1, fused=True)
    schedule = LambdaLR(optimizer, lambda n: 1 / (1 + n))
    DeviceRates(optimizer, torch.device("cpu"))
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    stepped(net, optimizer, schedule, 4)
    assert all(isinstance(rate, torch.Tensor) for rate in seen)
    assert type(optimizer.param_groups[0]["lr"]) is float

    other = nn.Linear(6, 2)
    other.load_state_dict(start)
    rate = torch.tensor(0.1)
    plain = AdamW(other.parameters(), lr=rate, fused=True)
    for n in range(4):
        rate.fill_(0.1 / (1 + n))
        other(torch.ones(3, 6)).square().sum().backward()
        plain.step()
        plain.zero_grad()
    assert_same(net.state_dict(), other.state_dict())


def test_released_rates_leave_the_optimizer_as_it_was() -> None:
    net = nn.Linear(6, 2)
    optimizer = AdamW(net.parameters(), lr=0.1, fused=True)
    rates = DeviceRates(optimizer, torch.device("cpu"))
    assert optimizer.param_groups[0]["capturable"] is True
    stepped(net, optimizer, LambdaLR(optimizer, lambda n: 1.0), 2)
    rates.release()
    assert optimizer.param_groups[0]["capturable"] is False
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(type(o.param_groups[0]["lr"])))
    stepped(net, optimizer, LambdaLR(optimizer, lambda n: 1.0), 1)
    assert seen == [float]


def test_an_option_that_changes_is_named() -> None:
    optimizer = AdamW(nn.Linear(6, 2).parameters(), lr=0.1)
    rates = DeviceRates(optimizer, torch.device("cpu"))
    rates.hold_options()
    optimizer.param_groups[0]["lr"] = 0.2
    assert rates.changed_option() is None
    optimizer.param_groups[0]["betas"] = (0.8, 0.999)
    assert rates.changed_option() == "the optimizer's betas went from (0.9, 0.999) to (0.8, 0.999)"


def test_a_rate_that_an_optimizer_cannot_read_on_the_device_is_an_option() -> None:
    optimizer = SGD(nn.Linear(6, 2).parameters(), lr=0.1)
    rates = DeviceRates(optimizer, torch.device("cpu"))
    rates.hold_options()
    optimizer.param_groups[0]["lr"] = 0.2
    assert rates.changed_option() == "the optimizer's lr went from 0.1 to 0.2"


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1)])
def test_drawing_on_the_host_is_seen(draw: Any) -> None:
    before = snapshot()
    refuse_host_randomness(before)
    draw()
    with pytest.raises(CannotCaptureError, match="draws random numbers on the host"):
        refuse_host_randomness(before)


@pytest.mark.parametrize("batch", [torch.ones(2), {"a": object()}, [torch.ones(2)]])
def test_a_batch_that_is_not_on_the_gpu_cannot_be_captured(batch: Any) -> None:
    with pytest.raises(CannotCaptureError, match="a batch holds"):
        leaves_of(batch, [], [])


def key_of(batch: Any) -> list[Any]:
    key: list[Any] = []
    leaves_of(batch, [], key)
    return key


def test_what_is_no_tensor_tells_batches_apart() -> None:
    assert key_of({"n": 3, "names": ["a", "b"]}) == key_of({"n": 3, "names": ["a", "b"]})
    assert key_of({"n": 3, "names": ["a", "b"]}) != key_of({"n": 4, "names": ["a", "b"]})
    assert key_of([["a"], ["b"]]) != key_of([["a", "b"], []])


def test_columns_of_many_steps_are_what_single_values_are() -> None:
    one, many = Metrics(), Metrics()
    losses, totals, counts = torch.rand(5), torch.rand(5), torch.rand(5) + 1
    for n in range(5):
        one.add({"loss": losses[n], "error": sheer.Mean(totals[n], counts[n])}, 8 + n)
    for start, stop in ((0, 2), (2, 5)):
        many.add_column("loss", losses[start:stop].double(), [8 + n for n in range(start, stop)])
        many.add_column("error", totals[start:stop].double(), counts[start:stop].double())
    assert many.read() == one.read()


def test_the_watch_names_the_first_bad_value_of_columns() -> None:
    watch = Watch()
    watch.add(3, "loss", torch.tensor(1.0))
    seen = [(step, what) for step in (4, 5) for what in ("loss", "gradient norm")]
    watch.add_column(seen, torch.tensor([1.0, 2.0, 3.0, torch.inf]))
    with pytest.raises(sheer.NonFiniteError, match="The gradient norm became NaN or infinite at step 5"):
        watch.check()


def test_skipped_steps_are_counted_once() -> None:
    watch = Watch()
    watch.add_skips([4, 5], torch.tensor([0.0, 1.0]))
    watch.add_skips([6], torch.tensor([1.0]))
    assert watch.take_skips() == [5, 6]
    assert watch.take_skips() == []


@pytest.mark.parametrize(
    "sizes", [{"dp_shard": 2}, {"tp": 2}, {"pp": 2, "pp_split": ("blocks.1",)}, {"cp": 2, "seq_dim": 1}]
)
def test_a_model_that_is_divided_over_ranks_is_not_captured(sizes: dict[str, Any]) -> None:
    parallel: Any = sheer.Parallel(**{"dp_replicate": 1, "dp_shard": 1, **sizes})
    device, mesh = torch.device("cuda"), cast(Any, None)
    ranks = Ranks(0, 2, device, parallel, mesh, mesh, data_rank=0, data_ranks=1)
    run: Any = SimpleNamespace(compute=SimpleNamespace(device=device), ranks=ranks)
    reason = why_not(sheer.Trainer(max_steps=1).settings, run, SGD(model().parameters(), 0.1), numbered=False)
    assert reason == "the model is divided over ranks, and only DDP can be captured"


def test_a_metric_object_is_not_captured() -> None:
    recorder = Recorder(torch.device("cpu"))
    with pytest.raises(
        CannotCaptureError, match="the step returns 'accuracy' as a MeanMetric, which a graph would keep"
    ):
        recorder.add({"accuracy": MeanMetric()}, 4)
