"""Metrics: exact whatever the batch size, kept on the device, read at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

import sheer
from sheer.errors import StepError
from sheer.metrics import Metrics, detached_number
from sheer.nonfinite import Watch
from tests.task import dataset, loader, model, step, trainer


def evaluated(net: nn.Module, step: Any, batch_size: int) -> dict[str, float]:
    return trainer().validate(net, step, loader(batch_size, shuffle=False))


@pytest.mark.parametrize("batch_size", [1, 3, 16, 99, 100, 1000])
def test_a_validation_is_the_same_for_any_batch_size(batch_size: int) -> None:
    net = model().eval()
    x, y = dataset().tensors
    with torch.no_grad():
        expected = {"val/loss": F.mse_loss(net(x), y).item(), "val/error": (net(x) - y).abs().mean().item()}
    assert evaluated(net, step, batch_size) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_a_mean_weighs_by_its_count(batch_size: int) -> None:
    def masked(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, sheer.Mean]:
        x, y = batch
        return {"loss": sheer.mean((net(x) - y) ** 2, mask=y > 1)}

    net = model().eval()
    x, y = dataset().tensors
    with torch.no_grad():
        expected = F.mse_loss(net(x)[y > 1], y[y > 1]).item()
    assert evaluated(net, masked, batch_size)["val/loss"] == pytest.approx(expected, rel=1e-6)


def test_mean_of_values() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert sheer.mean(values).total == 10.0 and sheer.mean(values).count == 4
    some = sheer.mean(values, mask=torch.tensor([[True], [False]]))
    assert some.total == 3.0 and some.count == 2.0


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_torchmetrics_objects_are_computed_over_all_batches(batch_size: int) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    correlation = torchmetrics.PearsonCorrCoef()

    def correlated(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        x, y = batch
        correlation.update(net(x).flatten(), y.flatten())
        return {"loss": F.mse_loss(net(x), y), "correlation": correlation}

    net = model().eval()
    x, y = dataset().tensors
    expected = torch.corrcoef(torch.stack([net(x).flatten(), y.flatten()]))[0, 1].item()
    assert evaluated(net, correlated, batch_size)["val/correlation"] == pytest.approx(expected, rel=1e-5)


def test_a_metric_object_that_training_and_validation_share_is_not_mixed() -> None:
    class Count:
        """Counts the batches it has seen."""

        seen = 0

        def compute(self) -> int:
            return self.seen

        def reset(self) -> None:
            self.seen = 0

    count = Count()

    def counted(net: nn.Module, batch: Any) -> dict[str, Any]:
        count.seen += 1
        return {"loss": F.mse_loss(net(batch[0]), batch[1]), "batches": count}

    lines: list[tuple[int, dict[str, float]]] = []

    class Keep:
        def start(self, info: Any) -> None: ...
        def log(self, step: int, metrics: Any) -> None:
            lines.append((step, {name: value for name, value in metrics.items() if name.endswith("batches")}))

        def close(self) -> None: ...

    net = model()
    trainer(
        max_steps=10, log_every_n_steps=5, validate_every_n_steps=3, loggers=[Keep(), sheer.Console(live=False)]
    ).fit(net, counted, loader(), loader(25), optimizer=torch.optim.SGD(net.parameters(), lr=0.01))
    assert lines == [
        (3, {"val/batches": 4.0}),
        (5, {"train/batches": 5.0}),
        (6, {"val/batches": 4.0}),
        (9, {"val/batches": 4.0}),
        (10, {"train/batches": 5.0}),
        (10, {"val/batches": 4.0}),
    ]


def test_several_loaders_give_a_name_each() -> None:
    results = trainer().test(model(), step, {"a": loader(10), "b": loader(50)})
    assert sorted(results) == ["test/a/error", "test/a/loss", "test/b/error", "test/b/loss"]


def test_reading_is_one_transfer_and_adding_is_none() -> None:
    metrics = Metrics()
    values = [torch.rand(()) for _ in range(2500)]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for value in values:
            metrics.add({"loss": value, "other": value}, 4)
    assert "aten::_local_scalar_dense" not in {event.key for event in profiled.key_averages()}
    assert metrics.read() == pytest.approx(
        {"loss": torch.stack(values).mean().item(), "other": torch.stack(values).mean().item()}
    )
    assert metrics.read() == {}


def test_a_metric_that_counted_nothing_is_not_a_number() -> None:
    metrics = Metrics()
    metrics.add({"loss": sheer.Mean(torch.tensor(0.0), torch.tensor(0))}, 4)
    assert math.isnan(metrics.read()["loss"])


@pytest.mark.parametrize("value", [torch.zeros(1000, 1000)[:1, :1], torch.zeros(1000, 1000)[0, 0]])
def test_a_scalar_in_a_large_memory_is_copied_out_of_it(value: Tensor) -> None:
    """As mse_loss returns it: kept as it is, every step would hold all of its squares until the next log point."""
    metrics, watch = Metrics(), Watch()
    for _ in range(2):
        alone = detached_number(value)
        metrics.add({"loss": value, "other": value}, 4, "", value, alone)
        metrics.add({"loss": value}, 4)
        watch.add(1, "loss", alone)
    for kept in (*metrics._sums["loss"].totals, *(kept for _, _, kept in watch._new)):
        assert isinstance(kept, Tensor) and kept.untyped_storage().nbytes() <= 64


@pytest.mark.parametrize(
    ("value", "message"),
    [((1.0, 2.0), r"sheer\.Mean\(total, count\)"), (torch.zeros(3), r"shape \[3\]"), (object(), "scalar tensor")],
)
def test_what_is_no_metric_is_refused(value: Any, message: str) -> None:
    with pytest.raises(StepError, match=message):
        Metrics().add({"loss": torch.tensor(1.0), "bad": value}, 1)


def test_one_name_is_of_one_kind() -> None:
    metrics = Metrics()
    metrics.add({"loss": 1.0}, 1)
    with pytest.raises(StepError, match="the same kind each time"):
        metrics.add({"loss": sheer.Mean(1.0, 1)}, 1)


def test_a_mean_of_sixteen_bit_values_counts_exactly() -> None:
    values = torch.ones(1001, dtype=torch.bfloat16)
    assert float(sheer.mean(values, torch.ones(1001, dtype=torch.bool)).count) == 1001
    nothing = sheer.mean(values.half(), torch.zeros(1001))
    assert nothing.count.dtype == torch.float32  # type: ignore[union-attr]


def test_a_collection_may_hold_what_is_a_table() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    kind = {"task": "multiclass", "num_classes": 2}
    collection = torchmetrics.MetricCollection(
        {"accuracy": torchmetrics.Accuracy(**kind), "confusion": torchmetrics.ConfusionMatrix(**kind)}
    )
    collection.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    metrics = Metrics()
    metrics.add({"of": collection}, 3)
    read = metrics.read()
    assert read.pop("of/accuracy") == pytest.approx(2 / 3)
    assert read == {f"of/confusion/{index}": float(value) for index, value in enumerate([1, 1, 0, 1])}


def test_an_object_that_computes_no_number_is_named() -> None:
    class Words:
        def compute(self) -> Any:
            return "many"

        def reset(self) -> None: ...

    metrics = Metrics()
    metrics.add({"words": Words()}, 1)
    with pytest.raises(StepError, match="The metric 'words' computed a str, which is no number"):
        metrics.read()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 1.0},
        {"micro_batch_size": 40},
        {"accumulate_grad_batches": 2},
        {"nonfinite": sheer.Rollback(), "checkpoint": True},
    ],
)
@pytest.mark.parametrize("as_mean", [False, True])
def test_what_a_run_watches_and_measures_holds_no_graph_and_no_other_memory(
    settings: dict[str, Any], as_mean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of `mse_loss` lies in the memory of all the squares, here those of 100 samples."""
    kept: list[Tensor] = []
    added = Watch.add

    def add(watch: Watch, step: int, what: str, value: Tensor) -> None:
        kept.append(value)
        added(watch, step, what, value)

    def read(metrics: Metrics, ranks: None = None) -> dict[str, float]:
        kept.extend(total for entry in metrics._sums.values() for total in entry.totals if isinstance(total, Tensor))
        return reading(metrics, ranks)

    reading = Metrics.read
    monkeypatch.setattr(Watch, "add", add)
    monkeypatch.setattr(Metrics, "read", read)
    x, y = torch.randn(400, 3), torch.randn(400, 1)
    net = nn.Linear(3, 1)

    def squares(net: nn.Module, batch: Any) -> Any:
        x, y = batch
        return sheer.Mean(F.mse_loss(net(x), y, reduction="sum"), len(x)) if as_mean else F.mse_loss(net(x), y)

    trainer(max_steps=2, log_every_n_steps=10, **settings).fit(
        net, squares, DataLoader(TensorDataset(x, y), batch_size=100), optimizer=SGD(net.parameters(), lr=0.01)
    )
    assert len(kept) >= 2
    assert not any(value.requires_grad for value in kept)
    assert max(value.untyped_storage().nbytes() for value in kept) <= 64
