"""autotune: tried with the real step, undone, checked, told and kept. What it finds on a GPU is in tests/gpu/test_autotune.py."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import sheer
from sheer.cli import app
from sheer.scripts import Call
from sheer.speed import autotune as tuning
from sheer.speed import trials
from sheer.speed.autotune import better, distance, find_way
from sheer.speed.command import advice
from sheer.speed.trials import Trial, trial_of
from sheer.speed.ways import Way, can_be, own_way
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
        (Trial(Way(fused=True), ms=0.99, losses=(1.0, 2.0)), "dropped: hardly faster"),
        (Trial(Way(fused=True), ms=1.01, losses=(1.0, 2.0)), "dropped: slower"),
        (Trial(Way(fused=True), ms=0.5, losses=(1.0, 2.1)), "dropped: its losses are 5.0% off"),
        (Trial(Way(fused=True), ms=0.5, losses=(1.0, float("nan"))), "dropped: its losses are inf% off"),
        (Trial(Way(fused=True), problem="out of memory"), "dropped: out of memory"),
        (Trial(Way(precision="bf16-mixed"), ms=0.5, losses=(1.01, 2.0)), "kept"),
        (Trial(Way(micro_batch_size=4), ms=0.5, losses=(1.01, 2.0)), "dropped: its losses are 1.0% off"),
    ],
)
def test_what_is_kept(trial: Trial, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    best = Trial(Way(), ms=1.0, losses=(1.0, 2.0))
    monkeypatch.setattr(tuning, "trial_of", lambda call, way, device: trial if way == trial.way else best)
    said: list[str] = []
    task = call()
    after = better(task, best, trial.way, Way(), CPU, said.append)
    assert said[0].endswith(verdict)
    verified = "-" if trial.problem else "no" if verdict.endswith("off") else "yes"
    assert said[0].split()[2] == verified
    assert (after.way == trial.way) is (verdict == "kept")
    assert after.losses == best.losses


def test_a_way_that_was_faster_is_compared_with_the_best_so_far_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may have slowed down the one, and not the other."""
    times = {Way(): 0.4, Way(fused=True): 0.5, Way(compile=True): 0.395, Way(foreach=True): 0.39}
    monkeypatch.setattr(tuning, "trial_of", lambda call, way, device: Trial(way, ms=times[way], losses=(1.0, 2.0)))
    said: list[str] = []
    best = Trial(Way(), ms=1.0, losses=(1.0, 2.0))
    task = call()
    after = better(task, best, Way(fused=True), Way(), CPU, said.append)
    assert said[0].endswith("fused=True: dropped: the best so far took 0.400 ms behind it")
    assert after == dataclasses.replace(best, ms=0.4)  # which those behind it are compared with
    assert better(task, after, Way(compile=True), Way(), CPU, said.append) is after
    assert said[1].endswith("compile=True: dropped: hardly faster")
    assert better(task, after, Way(foreach=True), Way(), CPU, said.append).way == Way(foreach=True)


def test_losses_that_are_nan_are_off() -> None:
    assert not distance((1.0, float("nan")), (1.0, 2.0)) <= 1.0


def test_micro_batches_are_halved_until_they_fit() -> None:
    def hungry(net: nn.Module, batch: Any) -> Any:
        if len(batch[0]) > 4:
            raise torch.OutOfMemoryError("too much")
        return loss_step(net, batch)

    task, said = dataclasses.replace(call(), step=hungry), []
    tried: set[Way] = set()
    trial = tuning.fitting(task, own_way(task.settings), CPU, said.append, tried)
    assert trial.way.micro_batch_size == 4 and [line.split("  ")[-1].strip() for line in said] == [
        "the script's own: out of memory", "micro_batch_size=8: out of memory", "micro_batch_size=4",
    ]  # fmt: skip
    assert {way.micro_batch_size for way in tried} == {None, 8, 4}


def test_a_graph_that_cannot_be_is_left_out_of_what_is_tried() -> None:
    task, said = call(cuda_graph=True), list[str]()
    assert not find_way(task, said.append).cuda_graph
    assert said[2].endswith("the script's own: there is no CUDA device")
    assert said[3].endswith("cuda_graph=False")


def test_an_error_of_the_scripts_own_step_comes_through() -> None:
    def wrong(net: nn.Module, batch: Any) -> Any:
        return net(batch[0].T).mean()

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        find_way(dataclasses.replace(call(), step=wrong), list[str]().append)
    assert any("In step 1; its batch:" in note for note in raised.value.__notes__)


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


def test_a_run_that_is_tuned_is_the_run_that_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tried, with the model, the optimizer and the generators of the run, has left no trace in it."""
    monkeypatch.setattr(tuning, "ways_to_execute", lambda *given: [])  # the compiler takes its time
    nets = []
    for autotune in (True, False):
        way = {} if autotune else json.loads(Path("tuned/autotune.json").read_text())
        torch.manual_seed(0)
        nets.append(model(dropout=0.2))
        chosen = {name: True for name in ("fused", "foreach") if way.get(name)}
        workers = {} if way.get("num_workers") is None else {"num_workers": way["num_workers"]}
        sheer.Trainer(
            max_epochs=2,
            device="cpu",
            autotune=autotune,
            run_dir="tuned" if autotune else "plain",
            micro_batch_size=4 if autotune else way["micro_batch_size"],
        ).fit(nets[-1], step, loader(16, **workers), optimizer=AdamW(nets[-1].parameters(), lr=1e-2, **chosen))
    assert_same(nets[0].state_dict(), nets[1].state_dict())


def test_optimizers_that_cannot_be_fused_or_say_so_themselves() -> None:
    parameters = list(model().parameters())
    assert can_be("fused", AdamW(parameters)) and can_be("fused", SGD(parameters, lr=0.1))
    assert not can_be("fused", AdamW(parameters, fused=False)) and not can_be("fused", torch.optim.RMSprop(parameters))
    assert not can_be("fused", AdamW(parameters, foreach=True)) and not can_be(
        "fused", AdamW(parameters, differentiable=True)
    )
    assert can_be("foreach", torch.optim.RMSprop(parameters)) and not can_be("foreach", AdamW(parameters, fused=True))
    assert not can_be("foreach", torch.optim.RMSprop(parameters, foreach=False))


def test_foreach_is_tried_where_it_is_no_default() -> None:
    """On a GPU PyTorch takes it by itself."""
    task = call(torch.optim.RMSprop(model().parameters()))
    best = Trial(own_way(task.settings))
    assert tuning.faster_optimizers(task, best, best.way, CPU) == [Way(foreach=True)]
    assert tuning.faster_optimizers(task, best, best.way, torch.device("cuda")) == []
    assert tuning.faster_optimizers(task, Trial(Way(foreach=True)), best.way, CPU) == []
    assert advice(Way(foreach=True), best.way) == "write foreach=True for the optimizer"


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_an_optimizer_is_switched_as_its_constructor_would_and_back(implementation: str) -> None:
    way, (given, made) = Way(**{implementation: True}), (model(), model())
    optimizer, fresh = AdamW(given.parameters(), lr=1e-2), AdamW(given.parameters(), lr=1e-2)
    wanted = AdamW(made.parameters(), lr=1e-2, **{implementation: True})
    assert way.optimizer(optimizer) is optimizer
    built = way.optimizer(lambda net: AdamW(net.parameters(), lr=1e-2))(given)
    for switched in (optimizer, built):
        assert switched.defaults == wanted.defaults
        assert options(switched) == options(wanted)
        assert scales(switched) == scales(wanted)
    made.load_state_dict(given.state_dict())
    for net, stepped in ((given, optimizer), (made, wanted)):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        stepped.step()
    assert_same(given.state_dict(), made.state_dict())
    way.switch(built, False)
    assert built.defaults == fresh.defaults and options(built) == options(fresh) and scales(built) == scales(fresh)


def scales(optimizer: Any) -> bool:
    """Whether a gradient scaler lets an optimizer take the scaling, by what PyTorch's own constructors set."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def test_workers_and_how_far_they_are_ahead_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    warnings.filterwarnings("ignore", "This DataLoader will create 4 worker processes")
    task = call()
    own = Trial(own_way(task.settings))
    assert [way.num_workers for way in tuning.more_workers(task, own, own.way, CPU)] == [1, 4]
    assert tuning.more_ahead(task, own, own.way, CPU) == []
    with_workers = dataclasses.replace(own.way, num_workers=4)
    (ahead,) = tuning.more_ahead(task, Trial(with_workers), own.way, CPU)
    assert (ahead.num_workers, ahead.prefetch_factor) == (4, 8)
    changed = ahead.loader(task.loader)
    assert (changed.num_workers, changed.prefetch_factor, task.loader.num_workers) == (4, 8, 0)
    assert with_workers.loader(task.loader).prefetch_factor == 2
    # A script that goes on without workers:
    without = dataclasses.replace(own.way, prefetch_factor=8).loader(task.loader)
    assert (without.num_workers, without.prefetch_factor) == (0, None)
    assert advice(ahead, own.way) == "write num_workers=4, prefetch_factor=8 for the training loader"

    def given(**how: Any) -> list[Way]:
        loaded = dataclasses.replace(task, loader=DataLoader([1.0], num_workers=2, **how))
        return tuning.more_ahead(loaded, own, own.way, CPU)

    assert [(way.num_workers, way.prefetch_factor) for way in given()] == [(None, 8)]
    loaded = dataclasses.replace(task, loader=DataLoader([1.0], num_workers=2))
    assert [way.num_workers for way in tuning.more_workers(loaded, own, own.way, CPU)] == [0, 4]
    assert tuning.more_workers(loaded, own, own.way, CPU)[0].loader(loaded.loader).num_workers == 0
    loaded = dataclasses.replace(task, loader=DataLoader([1.0], num_workers=4, persistent_workers=True))
    assert tuning.more_workers(loaded, own, own.way, CPU) == []
    loaded.loader._iterator = object()  # stands for its workers, which were started as they were
    assert ahead.loader(loaded.loader)._iterator is None
    assert given(prefetch_factor=16) == []


def test_a_loader_that_is_further_ahead_gives_the_same_losses() -> None:
    task = call()
    alone, ahead = (trial_of(task, way, CPU) for way in (Way(), Way(num_workers=1, prefetch_factor=8)))
    assert ahead.problem is None and ahead.losses == alone.losses


@pytest.mark.parametrize(
    ("precision", "capability", "torchao", "tried"),
    [
        ("32-true", (9, 0), True, ["tf32-true", "bf16-mixed"]),
        ("bf16-mixed", (9, 0), True, ["float8-mixed"]),
        ("bf16-mixed", (8, 0), True, []),
        ("bf16-mixed", (9, 0), False, []),
        ("bf16-true", (9, 0), True, []),
        ("tf32-true", (9, 0), True, []),
    ],
)
def test_which_precisions_are_tried(
    precision: str, capability: tuple[int, int], torchao: bool, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: torchao or None)
    task = call()
    best = Trial(Way(precision=precision, cuda_graph=True))
    ways = tuning.lower_precisions(task, best, Way(precision=precision), torch.device("cuda"))
    assert ways == [Way(precision=name, cuda_graph=True) for name in tried]
    assert tuning.lower_precisions(task, best, Way(precision=precision), CPU) == []


def test_another_precision_is_kept_only_where_it_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of the preflight gets a line, and float8 is taken for its time and its losses alone."""
    ms = {"bf16-mixed": 1.0, "float8-mixed": 0.7}

    def measured(call: Call, way: Way, device: torch.device, is_own: bool = False) -> Trial:
        return Trial(way, ms=ms[way.precision], losses=(1.0, 2.0))

    monkeypatch.setattr(tuning, "trial_of", measured)
    monkeypatch.setattr(tuning, "faster_optimizers", lambda *_: [])
    monkeypatch.setattr(tuning, "more_workers", lambda *_: [])
    monkeypatch.setattr(
        tuning, "lower_precisions", lambda call, best, *_: [dataclasses.replace(best.way, precision="float8-mixed")]
    )
    task, said = call(precision="bf16-mixed"), list[str]()
    assert find_way(task, said.append).precision == "float8-mixed"
    assert said[1].split() == ["ms", "a", "step", "peak", "MiB", "verified", "way"]
    assert said[-2].split() == ["0.700", "-", "yes", "precision='float8-mixed':", "kept"]
    ms["float8-mixed"] = 0.99
    assert find_way(task, said.append).precision == "bf16-mixed"
    assert said[-2].split() == ["0.990", "-", "yes", "precision='float8-mixed':", "dropped:", "hardly", "faster"]


def test_a_trial_puts_back_what_is_global_and_what_a_state_dict_leaves_out() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()
            self.register_buffer("calls", torch.zeros(()), persistent=False)
            self.register_buffer("kept", torch.zeros(2), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.net(x)

    def compiled(*arguments: Any) -> None:
        raise AssertionError

    task = dataclasses.replace(call(), model=Counted())
    child = next(task.model.children())
    torch.set_float32_matmul_precision("highest")
    with trials.undone(task, Way(precision="tf32-true")):
        torch.set_float32_matmul_precision("high")
        task.model.calls += 1
        task.model.kept = torch.ones(7)  # as a cache grows
        child._compiled_call_impl = compiled
    assert torch.get_float32_matmul_precision() == "highest"
    assert task.model.calls == 0 and task.model.kept.tolist() == [0.0, 0.0] and child._compiled_call_impl is None
    child._compiled_call_impl = compiled  # the script's own
    with trials.undone(task, Way()):
        child._compiled_call_impl = None
    assert child._compiled_call_impl is compiled


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
