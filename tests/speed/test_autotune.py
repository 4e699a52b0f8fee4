"""autotune: tried with the real step, undone, checked, told and kept. What it finds on a GPU is in tests/gpu/test_autotune.py."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from typer.testing import CliRunner

import sheer
from sheer.cli import app
from sheer.scripts import Call
from sheer.speed import autotune as tuning
from sheer.speed import trials
from sheer.speed.autotune import better, distance, find_way
from sheer.speed.command import advice
from sheer.speed.trials import Trial, trial_of
from sheer.speed.ways import Way, can_be_fused, own_way
from tests.task import assert_same, loader, loss_step, model, step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "SECONDS", 0.0)
    monkeypatch.setattr(tuning, "ways_to_execute", lambda *_: [])  # compiling takes half a minute; a GPU test does it


def call(optimizer: Any = None, **settings: Any) -> Call:
    net = model()
    made = optimizer or AdamW(net.parameters(), lr=1e-2)
    trainer = sheer.Trainer(max_epochs=2, device="cpu", **settings)
    return Call(trainer.settings, trainer.plugins, net, step, loader(16), made)


def test_a_trial_leaves_everything_as_it_was() -> None:
    torch.manual_seed(3)
    task = call()
    weights, state, drawn = (
        copy.deepcopy(task.model.state_dict()),
        copy.deepcopy(task.optimizer.state_dict()),
        torch.get_rng_state(),
    )
    task.model.eval()
    trial = trial_of(task, Way(fused=True), CPU)
    assert trial.problem is None and trial.ms > 0 and len(trial.losses) == trials.WARM_UP_ROUNDS
    assert_same(task.model.state_dict(), weights)
    assert task.optimizer.state_dict() == state and not task.optimizer.state
    assert torch.equal(torch.get_rng_state(), drawn) and not task.model.training
    assert all(parameter.grad is None for parameter in task.model.parameters())
    assert not Path("runs").exists()


def test_the_losses_of_a_trial_are_those_of_a_run() -> None:
    task = call()
    trial = trial_of(task, own_way(task.settings), CPU)
    assert trial_of(task, own_way(task.settings), CPU).losses == trial.losses
    net = model()
    sheer.Trainer(max_steps=20, log_every_n_steps=10, checkpoint=False, device="cpu", run_dir="run").fit(
        net, step, loader(16), optimizer=AdamW(net.parameters(), lr=1e-2)
    )
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert tuple(line["train/loss"] for line in lines) == trial.losses


def test_a_step_that_fails_in_a_way_is_no_error_of_the_tuning() -> None:
    def breaks(net: nn.Module, batch: Any) -> Any:
        if len(batch[0]) < 16:
            raise RuntimeError("too small")
        return loss_step(net, batch)

    task = dataclasses.replace(call(), step=breaks)
    trial = trial_of(task, Way(micro_batch_size=8), CPU)
    assert trial.problem == "RuntimeError: too small"


@pytest.mark.parametrize(
    ("trial", "verdict"),
    [
        (Trial(Way(fused=True), ms=0.5, losses=(1.0001, 2.0)), "kept"),
        (Trial(Way(fused=True), ms=0.99, losses=(1.0, 2.0)), "dropped: no faster"),
        (Trial(Way(fused=True), ms=0.5, losses=(1.0, 2.1)), "dropped: its losses are 5.0% off"),
        (Trial(Way(fused=True), ms=0.5, losses=(1.0, float("nan"))), "dropped: its losses are inf% off"),
        (Trial(Way(fused=True), problem="out of memory"), "dropped: out of memory"),
        (Trial(Way(precision="bf16-mixed"), ms=0.5, losses=(1.01, 2.0)), "kept"),
        (Trial(Way(micro_batch_size=4), ms=0.5, losses=(1.01, 2.0)), "dropped: its losses are 1.0% off"),
    ],
)
def test_what_is_kept(trial: Trial, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "trial_of", lambda *_: trial)
    said: list[str] = []
    task = call()
    best = Trial(Way(), ms=1.0, losses=(1.0, 2.0))
    after = better(task, best, trial.way, Way(), CPU, said.append)
    assert said[0].endswith(verdict)
    assert (after.way == trial.way) is (verdict == "kept")
    assert after.losses == best.losses


def test_losses_that_are_nan_are_off() -> None:
    assert not distance((1.0, float("nan")), (1.0, 2.0)) <= 1.0


def test_micro_batches_are_halved_until_they_fit() -> None:
    def hungry(net: nn.Module, batch: Any) -> Any:
        if len(batch[0]) > 4:
            raise torch.OutOfMemoryError("too much")
        return loss_step(net, batch)

    task, said = dataclasses.replace(call(), step=hungry), []
    trial = tuning.fitting(task, own_way(task.settings), CPU, said.append)
    assert trial.way.micro_batch_size == 4 and [line.split("  ")[-1] for line in said] == [
        "the script's own", "micro_batch_size=8", "micro_batch_size=4",
    ]  # fmt: skip


def test_a_run_takes_the_way_keeps_it_and_takes_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def chosen(call: Call) -> Way:
        asked.append(call)
        return Way(fused=True, micro_batch_size=8)

    monkeypatch.setattr(tuning, "find_way", chosen)
    how: dict[str, Any] = {"device": "cpu", "run_dir": "run", "resume": "auto", "autotune": True}
    nets = []
    for epochs in (1, 2):
        torch.manual_seed(0)
        nets.append(model())
        made = AdamW(nets[-1].parameters(), lr=1e-2)
        sheer.Trainer(max_epochs=epochs, **how).fit(nets[-1], step, loader(16), optimizer=made)
        assert made.param_groups[0]["fused"] is True
    assert len(asked) == 1
    assert json.loads(Path("run/autotune.json").read_text())["micro_batch_size"] == 8
    assert "as when the run began: micro_batch_size=8, fused=True" in capsys.readouterr().out

    torch.manual_seed(0)
    other = model()
    sheer.Trainer(max_epochs=2, device="cpu", run_dir="plain", micro_batch_size=8).fit(
        other, step, loader(16), optimizer=AdamW(other.parameters(), lr=1e-2, fused=True)
    )
    assert_same(nets[1].state_dict(), other.state_dict())


def test_the_whole_preflight_on_the_cpu() -> None:
    said: list[str] = []
    task = call(micro_batch_size=4)
    way = find_way(task, said.append)
    text = "\n".join(said)
    assert "the script's own" in text and "fused=True" in text and "micro_batch_size=8" in text
    assert way.precision == "32-true" and not way.cuda_graph


def test_optimizers_that_cannot_be_fused_or_say_so_themselves() -> None:
    parameters = list(model().parameters())
    assert can_be_fused(AdamW(parameters)) and can_be_fused(SGD(parameters, lr=0.1))
    assert not can_be_fused(AdamW(parameters, fused=False)) and not can_be_fused(torch.optim.RMSprop(parameters))


SCRIPT = """
import sheer
from tests.task import loader, model, step
from torch.optim import AdamW

net = model()
trainer = sheer.Trainer(max_epochs=1, device="cpu", run_dir="run")
trainer.fit(net, step, loader(16), optimizer=AdamW(net.parameters()))
raise SystemExit("trained")
"""


def test_the_command_says_what_to_write_and_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sheer.speed.command.find_way", lambda call: Way(compile=True, fused=True, num_workers=4))
    Path("train.py").write_text(SCRIPT)
    done = CliRunner().invoke(app, ["autotune", "train.py"])
    assert done.exit_code == 0, done.output
    assert "sheer.Trainer(..., compile=True)" in done.output
    assert "fused=True" in done.output and "num_workers=4" in done.output
    assert not Path("run").exists()


def test_a_loop_of_ones_own_is_not_trained_but_refused() -> None:
    started = "trainer.start(net, optimizers={'adam': AdamW(net.parameters())})"
    Path("train.py").write_text(SCRIPT.split("trainer.fit(")[0] + started)
    done = CliRunner().invoke(app, ["autotune", "train.py"])
    assert done.exit_code == 2 and "sheer autotune runs the step of trainer.fit" in done.output
    assert not Path("run").exists()


def test_ones_own_loop_is_told_that_it_is_not_tuned() -> None:
    net = model()
    with pytest.warns(sheer.SheerWarning, match="autotune=True tunes fit"):
        sheer.Trainer(max_steps=1, device="cpu", run_dir="run", autotune=True).start(
            net, optimizers={"sgd": SGD(net.parameters(), 0.1)}
        ).finish()


def test_a_script_that_trains_nothing() -> None:
    Path("train.py").write_text("import sheer\n")
    done = CliRunner().invoke(app, ["autotune", "train.py"])
    assert done.exit_code == 2 and "ended without a call of fit" in done.output


def test_where_batches_are_divided_and_compiled_less_is_kept_for_twice_the_micro_batch() -> None:
    task = call(micro_batch_size=4)  # of batches of 16
    best = Trial(own_way(task.settings))
    assert tuning.recomputation(task, best, best.way, CPU) == []
    compiled = dataclasses.replace(best.way, compile=True)
    found = tuning.recomputation(task, Trial(compiled), best.way, CPU)
    assert [(way.micro_batch_size, way.activation_memory_budget) for way in found] == [(8, 0.8), (8, 0.5)]
    whole = tuning.recomputation(task, Trial(dataclasses.replace(compiled, micro_batch_size=8)), best.way, CPU)
    assert [way.micro_batch_size for way in whole] == [None, None]
    assert advice(found[0], best.way) == (
        "write sheer.Trainer(..., compile=sheer.Compile(activation_memory_budget=0.8), micro_batch_size=8)"
    )
