"""`cuda_graph=True` on a GPU: bit for bit the run without graphs, and what cannot be captured says so."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import sheer
from sheer.metrics import Metrics
from sheer.nonfinite import Watch
from sheer.speed import graph
from sheer.speed.rates import DeviceRates
from sheer.speed.record import Recorder
from tests.task import assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class Net(nn.Module):
    """With dropout and a batch norm: what has a state besides the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(32, 32),
            nn.ReLU(),
            nn.Linear(32, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def data(samples: int = 100) -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(samples, 6, generator=draw), torch.randn(samples, 1, generator=draw))


def step(net: nn.Module, batch: Any) -> Any:
    x, y = batch
    error = net(x) - y
    return {"loss": error.square().mean(), "error": sheer.mean(error.abs())}


def fused(net: nn.Module) -> Optimizer:
    return AdamW(net.parameters(), lr=1e-2, fused=True)


def trained(
    captured: bool,
    folder: str,
    optimizer: Callable[[nn.Module], Optimizer] = fused,
    scheduler: Any = None,
    batch_size: int = 16,
    step: Any = step,
    max_epochs: int = 6,
    rates: bool = True,
    samples: int = 100,
    **settings: Any,
) -> tuple[nn.Module, Optimizer, list[dict[str, Any]], int]:
    """Train with or without graphs; without, the rates are on the device, too. Returns also how many replays there were."""
    torch.manual_seed(0)
    net = Net()
    made: list[Optimizer] = []

    def build(net: nn.Module) -> Optimizer:
        made.append(optimizer(net))
        if not captured and rates:
            DeviceRates(made[0], torch.device("cuda"))
        return made[0]

    replays = 0
    replay = torch.cuda.CUDAGraph.replay

    def counted(self: Any) -> None:
        nonlocal replays
        replays += 1
        replay(self)

    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    try:
        sheer.Trainer(
            max_epochs=max_epochs,
            device="cuda",
            cuda_graph=captured,
            run_dir=folder,
            log_every_n_steps=3,
            loggers=[sheer.Console(live=False)],
            **{"checkpoint": False, **settings},
        ).fit(net, step, DataLoader(data(samples), batch_size, shuffle=True), optimizer=build, scheduler=scheduler)
    finally:
        patch.undo()
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return net, made[0], [{k: v for k, v in line.items() if k != "time"} for line in lines], replays


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"gradient_clip_val": 0.5},
    "clip by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "tf32": {"precision": "tf32-true"},
    "64-true": {"precision": "64-true"},
    "16-mixed": {"precision": "16-mixed", "gradient_clip_val": 1.0},
    "accumulate": {"accumulate_grad_batches": 2},
    "micro-batches": {"micro_batch_size": 8},
    "skip": {"nonfinite": "skip"},
    "ignore": {"nonfinite": "ignore"},
    "schedule": {"scheduler": lambda o, total: LambdaLR(o, lambda n: 1 - n / total)},
    "one cycle": {"scheduler": lambda o, total: OneCycleLR(o, max_lr=0.02, total_steps=total, cycle_momentum=False)},
    "by epoch": {"scheduler": lambda o, total: LambdaLR(o, lambda n: 0.5**n), "scheduler_interval": "epoch"},
    "foreach": {"optimizer": lambda net: AdamW(net.parameters(), lr=1e-2, foreach=True)},
    "sgd": {"optimizer": lambda net: SGD(net.parameters(), lr=1e-2, momentum=0.9)},
    "fused sgd": {
        "optimizer": lambda net: SGD(net.parameters(), lr=1e-2, momentum=0.9, fused=True),
        "scheduler": lambda o, total: LambdaLR(o, lambda n: 1 - n / total),
    },
    "saved": {"checkpoint": sheer.Checkpoint(every_n_steps=4)},
}


@pytest.mark.parametrize("case", CASES)
def test_bit_for_bit_the_run_without_graphs(case: str, tmp_path: Path) -> None:
    (net, optimizer, lines, none), (other, own, own_lines, replays) = (
        trained(captured, str(tmp_path / str(captured)), **CASES[case]) for captured in (False, True)
    )
    steps = 24 if "accumulate_grad_batches" in CASES[case] else 42
    assert none == 0 and replays == steps - 4  # 3 to warm up, and the first with a smaller batch
    assert_same(other.state_dict(), net.state_dict())
    for one, two in zip(optimizer.state.values(), own.state.values(), strict=True):
        assert_same(*({key: value.cpu() for key, value in state.items() if value is not None} for state in (one, two)))
    assert own_lines == lines


def test_averages_are_those_of_the_run_without_graphs(tmp_path: Path) -> None:
    plain, replayed = sheer.EMA(decay=0.9), sheer.EMA(decay=0.9)
    trained(False, str(tmp_path / "False"), callbacks=[plain])
    *_, replays = trained(True, str(tmp_path / "True"), callbacks=[replayed])
    averages, own = plain.averages(), replayed.averages()
    assert averages and own and replays > 30
    assert_same(own, averages)


def test_a_rate_that_is_a_plain_number_differs_by_rounding_only(tmp_path: Path) -> None:
    net, *_ = trained(True, str(tmp_path / "graph"))
    torch.manual_seed(0)
    other = Net()
    sheer.Trainer(max_epochs=6, device="cuda", run_dir=str(tmp_path / "plain"), checkpoint=False).fit(
        other, step, DataLoader(data(), 16, shuffle=True), optimizer=fused
    )
    for name, value in other.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_a_run_that_goes_on_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    whole, _, lines, _ = trained(True, str(tmp_path / "whole"), checkpoint=True)
    how: dict[str, Any] = {"checkpoint": sheer.Checkpoint(every_n_steps=5), "resume": "auto"}
    trained(True, str(tmp_path / "parts"), max_steps=17, **how)
    net, _, own, _ = trained(True, str(tmp_path / "parts"), **how)
    assert_same(net.state_dict(), whole.state_dict())
    seen = {line["step"]: line for line in own}
    assert all(seen[line["step"]] == line for line in lines if line["step"] > 18)  # a stop logs, too


def test_an_update_that_is_left_out_is_counted_and_changes_nothing(tmp_path: Path) -> None:
    def bad(net: nn.Module, batch: Any) -> Any:
        x, y = batch
        loss = (net(x) - y).square().mean()
        return loss * torch.where(x[0, 0] > 1.0, torch.nan, 1.0)

    how: dict[str, Any] = {"step": bad, "nonfinite": "skip", "checkpoint": True}
    net, *_ = trained(False, str(tmp_path / "False"), **how)
    other, _, _, replays = trained(True, str(tmp_path / "True"), **how)
    assert replays > 30
    assert_same(other.state_dict(), net.state_dict())
    counts = [
        json.loads((tmp_path / kind / "checkpoints/last/state.json").read_text())["progress"]
        for kind in ("False", "True")
    ]
    assert counts[0]["skipped"] == counts[1]["skipped"] > 0
    assert counts[0]["last_skipped"] == counts[1]["last_skipped"]


def test_a_schedule_counts_the_steps_that_were_tried(tmp_path: Path) -> None:
    """As docs/speed.md says: which updates were left out is known on the device."""
    made: list[LambdaLR] = []

    def schedule(optimizer: Optimizer, total: int) -> LambdaLR:
        made.append(LambdaLR(optimizer, lambda n: 1.0))
        return made[-1]

    def bad(net: nn.Module, batch: Any) -> Any:
        x, y = batch
        return (net(x) - y).square().mean() * torch.where(x[0, 0] > 1.0, torch.nan, 1.0)

    for captured in (False, True):
        trained(
            captured,
            str(tmp_path / str(captured)),
            step=bad,
            scheduler=schedule,
            nonfinite="skip",
            checkpoint=True,
            samples=96,
        )
    state = json.loads((tmp_path / "True" / "checkpoints/last/state.json").read_text())
    skipped = state["progress"]["skipped"]
    assert skipped > 3
    without, captured_steps = (schedule.last_epoch for schedule in made)
    assert without == 36 - skipped
    # Of the first three steps, which are made without a graph, one that is left out is not counted.
    assert 36 - min(skipped, 3) <= captured_steps <= 36


def test_a_loss_that_becomes_nan_is_named_with_its_step(tmp_path: Path) -> None:
    def bad(net: nn.Module, batch: Any) -> Any:
        bad.seen = bad.seen + 0  # type: ignore[attr-defined]
        return net(batch[0]).mean() * torch.where(count.add_(1) >= 20, torch.nan, 1.0)

    bad.seen = 0  # type: ignore[attr-defined]
    count = torch.zeros((), device="cuda")
    with pytest.raises(sheer.NonFiniteError, match="The loss became NaN or infinite at step 20"):
        trained(True, str(tmp_path / "run"), step=bad)


def waits(net: nn.Module, batch: Any) -> Any:
    loss = step(net, batch)["loss"]
    return loss if loss.item() > -1 else loss * 0


def draws(net: nn.Module, batch: Any) -> Any:
    return step(net, batch)["loss"] * (1 + random.random())


def numbers(net: nn.Module, batch: Any) -> Any:
    return {**step(net, batch), "half": 0.5}


def counts(net: nn.Module, batch: Any, step: int) -> Any:
    return (net(batch[0]) - batch[1]).square().mean()


class Norms:
    def on_gradients(self, step: int, net: nn.Module) -> None:
        pass


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"step": waits}, r"the step waits for the device.*\(test_graph\.py:\d+\)"),
        ({"step": draws}, "the step draws random numbers on the host"),
        ({"step": numbers}, "the step returns 'half' as a float"),
        ({"step": counts}, "the step function takes the step's number"),
        ({"callbacks": [Norms()]}, "Norms looks at the gradients"),
        (
            {"scheduler": lambda o, total: OneCycleLR(o, max_lr=0.02, total_steps=total)},
            r"the optimizer's betas went from \(.*\) to \(",
        ),
        (
            {
                "optimizer": lambda net: SGD(net.parameters(), lr=1e-2),
                "scheduler": lambda o, total: LambdaLR(o, lambda n: 1 - n / total),
            },
            "the optimizer's lr went from",
        ),
        ({"nonfinite": "skip", "optimizer": lambda net: AdamW(net.parameters(), lr=1e-2)}, "set fused=True"),
    ],
)
def test_what_cannot_be_captured_says_so_and_runs_as_before(
    how: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        random.seed(3)
        net, _, lines, _ = trained(True, str(tmp_path / "True"), **how)
    said = " ".join([capsys.readouterr().out, *(str(warning.message) for warning in caught)])
    assert "without a graph, for" in said or "go on without a graph" in said
    assert re.search(reason, said), said
    random.seed(3)
    known_before = "steps are made without" in said
    other, _, own, _ = trained(False, str(tmp_path / "False"), rates=not known_before, **how)
    if known_before or not re.search("went from", said):
        assert_same(net.state_dict(), other.state_dict())
    assert [line["step"] for line in own] == [line["step"] for line in lines]


def test_many_shapes_end_the_capturing(tmp_path: Path) -> None:
    class Ragged(torch.utils.data.Sampler[list[int]]):
        def __iter__(self) -> Any:
            return iter([list(range(n)) for n in range(4, 4 + graph.MOST + 2)])

        def __len__(self) -> int:
            return graph.MOST + 2

    torch.manual_seed(0)
    net = Net()
    with pytest.warns(sheer.SheerWarning, match=f"more than {graph.MOST} shapes"):
        sheer.Trainer(
            max_epochs=2, device="cuda", cuda_graph=True, run_dir=str(tmp_path / "run"), checkpoint=False
        ).fit(net, step, DataLoader(data(), batch_sampler=Ragged()), optimizer=fused)


@pytest.fixture(autouse=True)
def waits_are_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


class Watched:
    """Lets any wait for the device be an error between log points, and counts the memory asked for, once graphs are replayed."""

    def __init__(self) -> None:
        self.allocations: list[int] = []

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        if step % 50 == 20:
            torch.cuda.set_sync_debug_mode("error")
        self.allocations.append(torch.cuda.memory_stats()["num_device_alloc"])

    def on_step_end(self, step: int, model: nn.Module) -> None:
        if step % 50 == 45:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("captured", [False, True])
def test_nothing_waits_and_no_memory_is_asked_for_once_a_run_goes(
    captured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From behind the first log point and save on, over the next two."""
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))[1])
    torch.manual_seed(0)
    net, watched = Net(), Watched()
    sheer.Trainer(
        max_steps=200,
        device="cuda",
        cuda_graph=captured,
        gradient_clip_val=1.0,
        run_dir=str(tmp_path / "run"),
        checkpoint=sheer.Checkpoint(every_n_steps=50, asynchronous=False),
        log_every_n_steps=50,
        callbacks=[watched],
    ).fit(net, step, DataLoader(data(96), 16, shuffle=True), optimizer=fused)
    assert len(replays) == (200 - 3 if captured else 0)
    assert watched.allocations[12] == watched.allocations[49]  # no log point between
    assert watched.allocations[60] == watched.allocations[-1]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_compiled_model_is_captured(dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        nn.Dropout,
        "__init__",
        lambda self, p: (nn.Module.__init__(self), setattr(self, "p", dropout), setattr(self, "inplace", False))[0],
    )
    how: dict[str, Any] = {
        "compile": True,
        "gradient_clip_val": 1.0,
        "samples": 96,
    }  # of one shape: another is compiled anew
    net, _, _, replays = trained(True, str(tmp_path / "graph"), **how)
    other, *_ = trained(False, str(tmp_path / "plain"), **how)
    again, *_ = trained(False, str(tmp_path / "again"), **how)
    assert replays > 30
    assert_same(again.state_dict(), other.state_dict())
    assert_same(net.state_dict(), other.state_dict())


def test_metrics_of_replays_are_told_and_sent_without_a_wait() -> None:
    recorder, metrics, watch = Recorder(torch.device("cuda")), Metrics(), Watch()
    loss, norm = torch.tensor(3.0, device="cuda"), torch.tensor(2.0, device="cuda")
    recorder.add({"loss": loss, "error": sheer.Mean(norm, 4)}, samples=16)
    recorder.add({"loss": loss + 1, "error": sheer.Mean(norm, 4)}, samples=8)
    for value in (loss, norm):
        recorder.add_watched("loss", value)
    recorder.seal()
    recorder.steps = [1]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        recorder.tell(metrics, watch)
        metrics.send()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.first_bad(None) is None
    assert metrics.read() == {"loss": (3 * 16 + 4 * 8) / 24, "error": 0.5}


@pytest.mark.parametrize("more", [False, True])
def test_what_was_sent_is_read_without_a_wait_unless_more_was_added(more: bool) -> None:
    metrics = Metrics()
    metrics.add({"loss": torch.tensor(3.0, device="cuda")}, 2)
    metrics.send()
    if more:
        metrics.add({"loss": torch.tensor(6.0, device="cuda")}, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("default" if more else "error")
    try:
        assert metrics.read() == {"loss": 4.0 if more else 3.0}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.read() == {}
