"""`Trainer`: durations, validations, limits, what is written, and the other three methods."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, IterableDataset

import sheer
from sheer.launch import overriding
from tests.task import assert_same, dataset, loader, loss_step, model, step, trainer


def fit(
    *, val: Any = None, train: Any = None, net: nn.Module | None = None, step: Any = step, **settings: Any
) -> sheer.Result:
    net = net if net is not None else model()
    torch.manual_seed(0)
    return trainer(**settings).fit(
        net, step, train if train is not None else loader(), val, optimizer=AdamW(net.parameters(), lr=1e-2)
    )


class Seen:
    """Notes at which steps what happened."""

    def __init__(self) -> None:
        self.validated: list[int] = []
        self.saved: list[int] = []
        self.batches: list[Tensor] = []

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        self.batches += [part[0] for part, _ in batch]

    def on_validation_end(self, step: int, metrics: Any) -> None:
        self.validated.append(step)

    def on_save(self, step: int, path: Path) -> None:
        self.saved.append(step)


@pytest.mark.parametrize(
    ("settings", "steps", "reason"),
    [
        ({"max_steps": 10}, 10, "max_steps"),
        ({"max_epochs": 2}, 14, "max_epochs"),
        ({"max_steps": 30, "max_epochs": 1}, 7, "max_epochs"),
        ({"max_epochs": 4, "accumulate_grad_batches": 3}, 12, "max_epochs"),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6, "max_epochs"),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 6, "max_epochs"),
        ({"fast_dev_run": True}, 1, "max_steps"),
        ({"fast_dev_run": 3, "max_epochs": 100}, 3, "max_steps"),
    ],
)
def test_a_run_lasts_as_long_as_it_is_told(settings: dict[str, Any], steps: int, reason: str) -> None:
    result = fit(**settings)
    assert (result.step, result.stopped_by) == (steps, reason)


@pytest.mark.parametrize("duration", [0.2, "00:00:01"])
def test_a_run_ends_by_its_time(duration: Any) -> None:
    def slow(net: nn.Module, batch: Any) -> Tensor:
        time.sleep(0.02)
        return loss_step(net, batch)

    result = fit(max_time=duration, step=slow)
    assert result.stopped_by == "max_time" and 1 <= result.step <= 60


@pytest.mark.parametrize(
    ("settings", "validated"),
    [
        ({}, [7, 14]),
        ({"validate_every_n_steps": 5}, [5, 10, 14]),
        ({"validate_first": True}, [0, 7, 14]),
        ({"max_steps": 9}, [7, 9]),
        ({"limit_val_batches": 0}, []),
    ],
)
def test_validation_comes_when_it_is_told_and_at_the_end(settings: dict[str, Any], validated: list[int]) -> None:
    seen = Seen()
    fit(val=loader(50), callbacks=[seen], **{"max_epochs": 2, **settings})
    assert seen.validated == validated


def test_limits_of_a_validation() -> None:
    net = model()
    first = trainer().validate(net, step, loader(10, shuffle=False), limit_batches=2)
    share = trainer().validate(net, step, loader(10, shuffle=False), limit_batches=0.2)
    whole = trainer().validate(net, step, loader(10, shuffle=False))
    assert first == share != whole


def test_overfitting_sees_the_same_batches_each_epoch() -> None:
    seen = Seen()
    fit(max_epochs=3, overfit_batches=2, callbacks=[seen])
    assert len(seen.batches) == 6
    for later in (2, 4):
        assert torch.equal(seen.batches[0], seen.batches[later]) and torch.equal(
            seen.batches[1], seen.batches[later + 1]
        )


def test_a_fast_dev_run_of_a_script_that_resumes_starts_afresh(capsys: pytest.CaptureFixture[str]) -> None:
    fit(max_steps=3, run_dir="run", resume="auto", checkpoint=True)
    assert fit(fast_dev_run=True, run_dir="run", resume="auto", checkpoint=True).step == 1
    assert "(fast_dev_run: nothing is resumed or kept)" in capsys.readouterr().out


def test_a_fast_dev_run_leaves_nothing_behind() -> None:
    result = fit(fast_dev_run=True, val=loader(), run_dir="run", checkpoint=True)
    assert result.metrics.keys() == {"val/loss", "val/error"} and result.last is None
    assert not Path("run").exists() and not Path("runs").exists()


@pytest.mark.parametrize(
    ("checkpoint", "saved"),
    [
        (sheer.Checkpoint(), [21]),
        (sheer.Checkpoint(every_n_steps=5), [5, 10, 15, 20, 21]),
        (sheer.Checkpoint(every_n_epochs=2), [14, 21]),
    ],
)
def test_checkpoints_come_when_they_are_told_and_at_the_end(checkpoint: sheer.Checkpoint, saved: list[int]) -> None:
    seen = Seen()
    fit(checkpoint=checkpoint, callbacks=[seen], run_dir="run")
    assert seen.saved == saved
    kept = sorted(int(path.name[5:]) for path in Path("run/checkpoints").glob("step-*"))
    assert kept == saved[-2:]


def test_the_last_and_the_best_checkpoints_stay() -> None:
    values = iter([5.0, 4.0, 1.0, 3.0, 2.0, 6.0])  # of the trial, and of steps 10, 20, 30, 40 and 50

    def judged(net: nn.Module, batch: Any) -> dict[str, Any]:
        return {"score": next(values)} if not net.training else {"loss": loss_step(net, batch)}

    result = fit(
        step=judged,
        val=[dataset()[:50]],
        max_steps=50,
        validate_every_n_steps=10,
        monitor="val/score",
        checkpoint=sheer.Checkpoint(every_n_steps=25, keep_last=2, keep_best=2),
        run_dir="run",
    )
    kept = sorted(int(path.name[5:]) for path in Path("run/checkpoints").glob("step-*"))
    assert kept == [20, 40, 50]
    assert result.best is not None and result.best.name == "step-00000020"
    assert result.last is not None and result.last.name == "step-00000050"


def test_a_second_process_in_the_same_folder_is_refused() -> None:
    from filelock import FileLock

    fit(run_dir="run", max_steps=2, checkpoint=True)
    before = Path("run/run.json").read_text()
    with FileLock("run/.lock"), pytest.raises(sheer.RunError, match="Another process is training in run"):
        fit(run_dir="run", max_steps=4, checkpoint=True, resume="auto")
    assert Path("run/run.json").read_text() == before
    assert fit(run_dir="run", max_steps=4, checkpoint=True, resume="auto").step == 4


def test_what_a_run_leaves() -> None:
    @dataclass
    class Parameters:
        lr: float = 0.1
        layers: tuple[int, ...] = (1, 2)

    fit(run_dir="run", hparams=Parameters(), checkpoint=True, max_epochs=1)
    record = json.loads(Path("run/run.json").read_text())
    assert record["hparams"] == {"lr": 0.1, "layers": [1, 2]}
    assert record["settings"]["max_epochs"] == 1 and record["seed"] == 0
    session = record["sessions"][0]
    assert session["versions"]["torch"] == torch.__version__ and session["command"] and "git" in session
    assert {path.name for path in Path("run/checkpoints/last").iterdir()} == {
        "manifest.json",
        "model.safetensors",
        "state.safetensors",
        "state.json",
        "optimizer.safetensors",
    }


@pytest.mark.parametrize("hparams", [{"lr": 1}, argparse.Namespace(lr=1)])
def test_hyper_parameters_may_be_a_mapping_or_a_namespace(hparams: Any) -> None:
    fit(run_dir="run", hparams=hparams, max_steps=1)
    assert json.loads(Path("run/run.json").read_text())["hparams"] == {"lr": 1}


def test_the_start_says_what_was_decided(capsys: pytest.CaptureFixture[str]) -> None:
    net = model()
    net[0].requires_grad_(False)
    fit(net=net, max_steps=3, accumulate_grad_batches=2, precision="bf16-mixed", run_dir="run")
    said = capsys.readouterr().out
    for words in (
        "bf16-mixed",
        "161 parameters, 112 of them frozen",
        "100 samples shuffled by seed 0",
        "2 batches a step",
        "3 steps",
    ):
        assert words in said
    assert "step 3/3 · epoch 0 · train/loss" in said


def test_a_device_that_is_live_shows_a_bar_without_a_line_for_each_log_point() -> None:
    import io

    out = io.StringIO()
    fit(max_epochs=2, log_every_n_steps=1, val=loader(50), loggers=[sheer.Console(live=True, file=out)])
    assert "val/loss" in out.getvalue() and "train/loss" not in out.getvalue()


def test_a_closed_output_does_not_stop_the_training() -> None:
    class Closed:
        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> int:
            raise BrokenPipeError("closed")

        def flush(self) -> None: ...

    with pytest.warns(sheer.SheerWarning, match="cannot print any more"):
        result = fit(max_steps=3, loggers=[sheer.Console(live=False, file=Closed())])  # type: ignore[arg-type]
    assert result.step == 3


def test_predict_yields_batch_by_batch_and_keeps_the_callers_gradients_on() -> None:
    read = []

    class Watched(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for number in range(5):
                read.append(number)
                yield dataset()[number * 4 : number * 4 + 4][0]

    net = model()
    outputs = trainer().predict(net, lambda m, x: m(x), DataLoader(Watched(), batch_size=None))
    assert read == []
    first = next(iter(outputs))
    assert read == [0] and not first.requires_grad and not net.training
    assert torch.is_grad_enabled() and (net[0].weight * 2).requires_grad
    assert len(list(outputs)) == 4 and net.training


def test_test_takes_the_best_the_last_or_a_path_and_tells_the_loggers() -> None:
    net = model()
    made = trainer(max_epochs=3, checkpoint=True, monitor="val/loss", run_dir="run")
    result = made.fit(net, step, loader(), loader(50), optimizer=SGD(net.parameters(), lr=0.05))
    best = made.test(net, step, loader(20), checkpoint="best")
    assert best["test/loss"] == pytest.approx(made.test(net, step, loader(20), checkpoint=result.best)["test/loss"])
    assert made.validate(net, step, loader(20), checkpoint="last").keys() == {"val/loss", "val/error"}
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "test/loss" in line] == [21, 21]


def test_a_step_may_take_its_number_and_an_unbound_method_is_a_step() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.numbers = nn.Linear(6, 1), list[int]()

        def training_step(self, batch: Any, step: int) -> Tensor:
            self.numbers.append(step)
            return (self.layer(batch[0]) - batch[1]).square().mean()

    net = Net()
    fit(net=net, step=Net.training_step, max_steps=3)
    assert net.numbers == [1, 2, 3]


def test_the_model_in_the_step_is_the_object_that_was_passed() -> None:
    net, seen = model(), []

    def watching(m: nn.Module, batch: Any) -> Tensor:
        seen.append(m is net)
        return loss_step(m, batch)

    fit(net=net, step=watching, val=loader(50), max_steps=2, callbacks=[sheer.EMA()])
    assert seen and all(seen)


def test_a_model_in_eval_mode_is_trained_in_train_mode() -> None:
    """As from_pretrained returns it: training it so would leave dropout out without a word."""
    net, modes = model().eval(), []

    def watching(m: nn.Module, batch: Any) -> Tensor:
        modes.append(m.training)
        return loss_step(m, batch)

    fit(net=net, step=watching, max_steps=2)
    assert modes == [True, True]


def test_the_trial_of_the_validation_changes_nothing() -> None:
    nets = []
    for val in (None, loader(50, shuffle=True)):
        net = model()
        fit(net=net, val=val, max_steps=5)
        nets.append(net)
    assert_same(nets[0].state_dict(), nets[1].state_dict())


def test_deterministic_refuses_what_is_not() -> None:
    def unsure(net: nn.Module, batch: Any) -> Tensor:
        torch.empty(3).put_(torch.tensor([0]), torch.tensor([1.0]), accumulate=False)
        return loss_step(net, batch)

    fit(step=loss_step, max_steps=1, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="deterministic"):
        fit(step=unsure, max_steps=1, deterministic=True)


def test_anomaly_detection_names_the_operation() -> None:
    def rooted(net: nn.Module, batch: Any) -> Tensor:
        return (net(batch[0]) * 0.0).sqrt().sum() * 0 + net(batch[0]).mean()

    with pytest.warns(UserWarning, match="Error detected in"), pytest.raises(RuntimeError, match="nan values"):
        fit(step=rooted, max_steps=1, detect_anomaly=True)


def test_a_second_signal_leaves_at_once_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)

    def impatient(net: nn.Module, batch: Any, step: int) -> Tensor:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return loss_step(net, batch)

    with pytest.raises(KeyboardInterrupt):
        fit(step=impatient, max_steps=5, checkpoint=True, run_dir="run")
    assert signal.getsignal(signal.SIGINT) is before
    assert not list(Path("run/checkpoints").glob("step-*"))


def test_an_error_in_a_script_points_to_the_loop_that_runs(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sheer, torch\n"
        "model = torch.nn.Linear(2, 1)\n"
        "def step(model, batch):\n    raise ValueError('mine')\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "sheer.Trainer(max_steps=2).fit(model, step, [torch.ones(4, 2)], optimizer=optimizer)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert f"its batch: float32 [4, 2]; `sheer show {script}` prints the loop." in done.stderr


def test_an_error_says_in_which_step_and_on_which_batch_it_happened() -> None:
    def failing(net: nn.Module, batch: Any, step: int) -> Tensor:
        if step == 3:
            raise ValueError("mine")
        return loss_step(net, batch)

    with pytest.raises(ValueError, match="mine") as error:
        fit(step=failing, max_steps=5)
    assert error.value.__notes__ == ["In step 3; its batch: [float32 [16, 6], float32 [16, 1]]."]


@pytest.mark.parametrize(
    "given",
    [
        {"max_steps": 3, "precision": "bf16-mixed", "run_dir": "run", "resume": "auto"},
        {"max_time": 60.0, "checkpoint": None, "nonfinite": "skip"},
        {"checkpoint": sheer.Checkpoint(every_n_steps=2), "nonfinite": sheer.Rollback(max_times=2), "parallel": "ddp"},
        {"compile": "blocks"},
    ],
)
def test_from_settings_and_the_arguments_are_the_same(given: dict[str, Any]) -> None:
    assert sheer.Trainer.from_settings(sheer.Settings(**given)).settings == sheer.Trainer(**given).settings


@pytest.mark.parametrize("mode", [True, "max-autotune"])
def test_from_settings_keeps_the_budget_of_activations(mode: Any) -> None:
    settings = sheer.Settings(compile=mode, activation_memory_budget=0.5)
    assert sheer.Trainer.from_settings(settings).settings == dataclasses.replace(settings, parallel="none")


def test_what_the_command_line_sets_goes_over_settings_given_as_one_object() -> None:
    settings = sheer.Settings(max_steps=3, run_dir="run", checkpoint=sheer.Checkpoint(every_n_steps=2))
    with overriding({"resume": "auto", "checkpoint.keep_last": "5"}):
        made = sheer.Trainer.from_settings(settings).settings
    assert (made.resume, made.checkpoint) == ("auto", sheer.Checkpoint(every_n_steps=2, keep_last=5))


def test_a_trainer_has_at_most_thirty_two_arguments() -> None:
    import inspect

    arguments = [p for p in inspect.signature(sheer.Trainer).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert len(arguments) <= 32


def test_load_weights_takes_a_run_a_checkpoint_or_a_file() -> None:
    net = model()
    result = fit(net=net, checkpoint=True, run_dir="run", max_steps=5)
    assert result.last is not None
    for source, which in (("run", "last"), (result.last, "best"), (result.last / "model.safetensors", "best")):
        other = model()
        sheer.load_weights(other, source, which)
        assert_same(other.state_dict(), net.state_dict())


def test_a_signal_that_comes_in_the_last_validation_still_ends_the_process() -> None:
    class Stops:
        def on_validation_end(self, step: int, metrics: Any) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        fit(val=loader(50), max_steps=4, checkpoint=True, callbacks=[Stops()], run_dir="run")
    assert left.value.code == 85
    assert Path("run/checkpoints/last").readlink().name == "step-00000004"


def test_the_trial_of_the_validation_draws_nothing_from_its_loaders_generator() -> None:
    seen = []

    def keep(net: nn.Module, batch: Any) -> Tensor:
        seen.append(batch[0][0, 0].item())
        return loss_step(net, batch)

    valid = loader(50, generator=torch.Generator().manual_seed(1))
    net = model()
    trainer(max_epochs=1).fit(net, step, loader(), valid, eval_step=keep, optimizer=AdamW(net.parameters()))
    first_by_hand = next(iter(loader(50, generator=torch.Generator().manual_seed(1))))[0][0, 0].item()
    assert seen[1] == first_by_hand  # seen[0] is the trial's


def test_a_validation_is_in_the_precision_of_the_training() -> None:
    seen = []

    def keep(net: nn.Module, batch: Any) -> Tensor:
        seen.append(net(batch[0]).dtype)
        return loss_step(net, batch)

    made = trainer(max_steps=1, precision="bf16-mixed")
    net = model()
    made.fit(net, step, loader(), loader(50), eval_step=keep, optimizer=AdamW(net.parameters()))
    made.test(net, keep, loader(50))
    assert set(seen) == {torch.bfloat16}


def test_the_last_step_is_logged_before_it_is_validated() -> None:
    fit(val=loader(50), max_steps=7, log_every_n_steps=50, run_dir="run")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert ["train/loss" in line for line in lines] == [True, False]


def test_a_step_may_be_an_object_that_has_no_hash() -> None:
    @dataclass
    class Weighted:
        weight: float

        def __call__(self, net: nn.Module, batch: Any, step: int) -> Tensor:
            return self.weight * step * loss_step(net, batch)

    net = model()
    assert trainer(max_steps=2).fit(net, Weighted(0.5), loader(), optimizer=AdamW(net.parameters())).step == 2


def test_the_iterator_of_an_epoch_is_gone_when_the_next_is_made() -> None:
    """It may hold workers."""
    alive: list[weakref.ref[Any]] = []

    class Batches:
        def __init__(self) -> None:
            self.left = list(loader())

        def __iter__(self) -> Batches:
            return self

        def __next__(self) -> Any:
            if not self.left:
                raise StopIteration
            return self.left.pop()

    class Loader:
        def __len__(self) -> int:
            return 7

        def __iter__(self) -> Iterator[Any]:
            assert all(ref() is None for ref in alive)
            made = Batches()
            alive.append(weakref.ref(made))
            return made

    net = model()
    trainer(max_epochs=3, limit_train_batches=3).fit(net, step, Loader(), optimizer=AdamW(net.parameters()))
    assert len(alive) == 3


def test_the_trial_of_the_validation_leaves_buffers_that_change_in_eval_mode() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 1)
            self.register_buffer("evaluated", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                self.evaluated += 1
            return self.linear(x)

    net = Counts()
    fit(net=net, val=loader(50), max_epochs=1)
    assert net.evaluated.item() == 2  # the batches of the one validation


def test_workers_that_persist_end_with_the_run_also_while_its_error_is_held() -> None:
    def fails(net: nn.Module, batch: Any, step: int) -> Tensor:
        if step == 3:
            raise ValueError("in the step")
        return loss_step(net, batch)

    before = set(multiprocessing.active_children())
    net = model()
    with pytest.raises(ValueError, match="in the step") as held:
        trainer(max_steps=5).fit(
            net, fails, loader(num_workers=1, persistent_workers=True), optimizer=AdamW(net.parameters())
        )
    assert set(multiprocessing.active_children()) == before
    assert held.value.__traceback__ is not None
