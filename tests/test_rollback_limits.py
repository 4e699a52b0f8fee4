"""What going back needs, what it cannot do, and what a person sees of it."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import sheer
from sheer.speed.trials import settings_of_trial
from tests.faults.runs import same
from tests.rollback import OFTEN, Step, lines_of, plain, progress_of, run
from tests.task import dataset, loader, loss_step, model

pytestmark = pytest.mark.usefixtures("in_memory")

BAD = [(1, 3)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_times": 0}, "max_times must be at least 1, not 0"),
        ({"max_times": 1.5}, "max_times must be an int"),
        ({"spike": 1.0}, "spike must be above 1, not 1.0"),
        ({"spike": math.nan}, "spike must be above 1"),
        ({"spike": "3"}, "spike must be a float or None"),
    ],
)
def test_values_are_checked(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(sheer.SettingsError, match=said):
        sheer.Rollback(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"checkpoint": False}, "checkpoint=False saves none. Leave one of them out"),
        ({"cuda_graph": True}, 'cuda_graph=True cannot follow yet.*set nonfinite="skip"'),
        ({"detect_anomaly": True}, "detect_anomaly=True ends the run in the step that makes a NaN"),
        ({"nonfinite": "rollback"}, 'one of "raise", "skip", "ignore" or a Rollback'),
    ],
)
def test_what_contradicts_it_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(sheer.SettingsError, match=said):
        sheer.Trainer(**{"max_steps": 1, "nonfinite": sheer.Rollback(), **settings})


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(dataset())


class Sized:
    def __iter__(self) -> Iterator[Any]:
        return iter(loader())

    def __len__(self) -> int:
        return 7


def test_data_that_cannot_go_back_are_refused_before_anything_is_made() -> None:
    net = model()
    trainer = sheer.Trainer(max_steps=1, nonfinite=sheer.Rollback(), run_dir="run", device="cpu")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    data = DataLoader(Numbers(), 16)
    with pytest.raises(sheer.DataError, match=r"a DataLoader over Numbers has no state\. Pass resume_by_skipping=True"):
        trainer.fit(net, loss_step, data, optimizer=optimizer)
    with pytest.raises(sheer.DataError, match="a Sized has no state"):
        trainer.fit(net, loss_step, {"a": loader(), "b": Sized()}, optimizer=optimizer)
    data = DataLoader(Numbers(), 16, num_workers=1, persistent_workers=True)
    with pytest.raises(sheer.DataError, match="Set persistent_workers=False"):
        trainer.fit(net, loss_step, data, optimizer=optimizer, resume_by_skipping=True)
    assert not Path("run").exists()


def test_a_loop_of_ones_own_is_refused() -> None:
    net = model()
    trainer = sheer.Trainer(max_steps=1, nonfinite=sheer.Rollback(), run_dir="run")
    with pytest.raises(sheer.SettingsError, match=r"what else your loop does would not go back\. Train with fit"):
        trainer.start(net, optimizers={"sgd": torch.optim.SGD(net.parameters(), lr=0.1)})


def test_trials_keep_nothing_and_do_not_go_back_and_the_command_line_sets_parts() -> None:
    assert sheer.Trainer(fast_dev_run=True, nonfinite=sheer.Rollback()).settings.nonfinite == "raise"
    assert settings_of_trial(sheer.Settings(nonfinite=sheer.Rollback()), "folder").nonfinite == "raise"
    changed = sheer.settings.overridden(
        sheer.Settings(nonfinite=sheer.Rollback()), {"nonfinite.spike": "4", "nonfinite.max_times": "5"}
    )
    assert changed.nonfinite == sheer.Rollback(max_times=5, spike=4)
    assert sheer.settings.overridden(changed, {"nonfinite": "skip"}).nonfinite == "skip"


def test_what_is_said_and_logged(capsys: pytest.CaptureFixture[str]) -> None:
    run("run", Step([(1, 3)]), rollback=sheer.Rollback(spike=20.0))
    said = capsys.readouterr().out.splitlines()
    assert (
        "rollback: a NaN, an infinity or a loss above 20 times the median leads back to the last good checkpoint, at most 3 times"
        in said
    )
    assert "rollback: step 0 is saved, to have a checkpoint to go back to" in said
    assert (
        "rollback 1 of 3: the loss became NaN or infinite at step 11; back to step 8, and on without batch 3 of epoch 1 (counted from 0)"
        in said
    )
    lines = [line for line in Path("run", "metrics.jsonl").read_text().splitlines() if '"rollbacks": 1.0' in line]
    assert len(lines) == 6 and '"step": 10' in lines[0] and "rollbacks" in Path("run", "metrics.csv").read_text()


def test_a_run_that_begins_from_a_checkpoint_of_another_can_go_back_to_where_it_began() -> None:
    run("first", Step([]), max_epochs=1)
    how: dict[str, Any] = {"resume": "first", "checkpoint": sheer.Checkpoint()}
    left = run("second", Step(BAD), **how)
    same({**left, "lines": []}, {**plain(BAD), "lines": []})
    assert Path("second", "checkpoints", "step-00000007-2").is_dir() and progress_of("second")["rollbacks"] == 1


def test_a_damaged_checkpoint_is_passed_over_and_deleted() -> None:
    there: list[list[str]] = []

    def damage(step: int, path: Path) -> None:
        there.append(sorted(saved.name for saved in path.parent.glob("step-*")))
        if step == 8 and not (path.parent / "step-00000004-2").exists():
            (path / "model.safetensors").write_bytes(b"")

    with pytest.warns(sheer.SheerWarning, match="step-00000008.* Going back to the checkpoint before it"):
        left = run("run", Step(BAD), callbacks=lambda: [sheer.On(save=damage)], log_every_n_steps=11)
    same(left, plain(BAD, every=11))
    assert there[3:5] == [["step-00000004-2"], ["step-00000004-2", "step-00000008"]]


def test_where_the_last_step_of_an_epoch_was_bad_and_nothing_is_left_before_it() -> None:
    """Step 7 ends the epoch. Step 6 is to end it instead, so it has to be made again, and the only checkpoint is from behind it."""
    with pytest.raises(
        sheer.NonFiniteError,
        match=r"There is no checkpoint in run/checkpoints that the run could go back to.*keep_last",
    ):
        run("run", Step([(0, 6)]), checkpoint=sheer.Checkpoint(every_n_steps=1, keep_last=1))


def test_a_loss_that_is_always_bad_ends_the_run() -> None:
    def always(net: nn.Module, batch: Any) -> Any:
        return loss_step(net, batch) * math.nan

    with pytest.raises(sheer.NonFiniteError, match=r"at step 1\..*The run went back 3 times before") as error:
        run("run", always, rollback=sheer.Rollback())
    assert "Bad were batches 0 to 3 of epoch 0 (counted from 0)" in str(error.value)
    assert "max_times=6" in str(error.value) and "Rollback(...) goes back" not in str(error.value)
    with pytest.raises(sheer.NonFiniteError, match="There is no checkpoint"):
        run("other", always, rollback=OFTEN)  # of the first epoch nothing is left


def test_no_bad_state_is_validated() -> None:
    seen: list[float] = []
    look = sheer.On(validation_end=lambda step, metrics: seen.append(metrics["val/loss"]))
    how: dict[str, Any] = {"validate_every_n_steps": 5, "log_every_n_steps": 50, "checkpoint": sheer.Checkpoint()}
    run("run", Step([(0, 3)]), callbacks=lambda: [look], val=loader(32, shuffle=False), **how)
    assert len(seen) == 4 and all(map(math.isfinite, seen))


def test_an_epoch_that_is_begun_again_is_told() -> None:
    epochs: list[int] = []
    look = sheer.On(epoch_start=lambda epoch, model: epochs.append(epoch))
    run("run", Step([(1, 0), (2, 3)]), callbacks=lambda: [look], checkpoint=sheer.Checkpoint(every_n_epochs=1))
    assert epochs == [0, 1, 1, 2, 2]


def test_a_signal_in_the_bad_step_saves_a_good_state(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(BAD)

    def told(step_number: int, net: nn.Module) -> None:
        if step.seen == [step_number]:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        run("run", step, callbacks=lambda: [sheer.On(gradients=told)])
    progress = progress_of("run")
    assert progress["rollbacks"] == 1 and progress["stopped_by"] == "SIGTERM" and progress["step"] == 9
    left = run("run", Step(BAD))
    same(left, plain(BAD))


def test_a_checkpoint_from_the_middle_of_a_validation_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    batches: list[int] = []

    def told(net: nn.Module, batch: Any) -> Any:
        batches.append(len(batch[0]))
        if len(batches) == 6:  # of the trial there is one, of each validation four
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_step(net, batch)

    how: dict[str, Any] = {
        "val": loader(32, shuffle=False),
        "validate_every_n_steps": 3,
        "checkpoint": sheer.Checkpoint(),
    }
    with pytest.raises(SystemExit):
        run("run", Step(BAD), fit={"eval_step": told}, **how)
    assert progress_of("run")["owes_validation"]
    left = run("run", Step(BAD), fit={"eval_step": loss_step}, **how)
    same(left, run("whole", Step(BAD), fit={"eval_step": loss_step}, **how))
    assert capsys.readouterr().out.count("back to step 0,") == 2


def test_tensorboard_shows_each_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Files of one second are read in the order of their names, which end in this count: 10 would come before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    run(
        "run",
        Step(BAD),
        loggers=[sheer.TensorBoard(), sheer.Console(live=False)],
        log_every_n_steps=1,
        checkpoint=sheer.Checkpoint(every_n_steps=9),
    )
    events = EventAccumulator("run/tensorboard").Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 21))
    assert [line["step"] for line in lines_of("run")] == list(range(1, 21))


class Pictures:
    """A logger that keeps the texts it is given."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.calls: list[str] = []

    def start(self, info: sheer.RunInfo) -> None:
        self.calls.append(f"start at {info.start_step}")

    def log(self, step: int, metrics: Any) -> None: ...

    def log_media(self, step: int, media: Any) -> None:
        self.texts |= {step: media["train/text"].text}

    def close(self) -> None:
        self.calls.append("close" if sys.exception() is None else "close by an error")


def test_what_a_bad_step_wanted_to_show_is_dropped_and_loggers_begin_again() -> None:
    inner, logger = Step(BAD), Pictures()

    def step(net: nn.Module, batch: Any, step: int) -> dict[str, Any]:
        out: dict[str, Any] = inner(net, batch, step)
        return {**out, **({"text": sheer.Text("bad")} if out["loss"].isnan() else {})}

    run("run", step, loggers=[logger])
    assert inner.seen and logger.texts == {}
    assert logger.calls == ["start at 0", "close", "start at 8", "close"]
