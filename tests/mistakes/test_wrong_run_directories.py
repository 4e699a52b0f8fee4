"""Run directories and checkpoints that cannot be used: refused before step 1, and not a byte in them changed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR

import sheer
from sheer import DataError, ModelError, RunError
from tests.mistakes.common import contents, finished_run, fit, linear, refused
from tests.task import dataset, loader, loss_step, model, trainer

AGAIN: dict[str, Any] = {"run_dir": "run", "resume": "auto", "max_steps": 8, "checkpoint": sheer.Checkpoint()}


def refused_and_untouched(error: type[sheer.SheerError], *words: str, **how: Any) -> None:
    before = contents("run")
    refused(error, *words, **how)
    assert contents("run") == before


def test_a_folder_that_holds_another_run() -> None:
    finished_run()
    refused_and_untouched(
        RunError, "run already holds a run", 'set resume="auto"', "give another run_dir", run_dir="run"
    )
    finished_run("other")
    refused_and_untouched(RunError, "run already holds a run", run_dir="run", resume="other")


def test_resuming_with_other_settings() -> None:
    finished_run()
    refused_and_untouched(
        RunError, "gradient_clip_val: None then, 1.0 now", "precision: '32-true' then, 'bf16-mixed' now", "Put them back",
        gradient_clip_val=1.0, precision="bf16-mixed", **AGAIN,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: loader(samples=90), "made with 100 samples in the training data, and now there are 90"),
        (lambda: loader(8), "made with 16 samples in a batch of the loader, and now there are 8"),
        (lambda: loader(shuffle=False), "made with shuffle=True, and the loader now has shuffle=False"),
        (lambda: [tuple(t[:16] for t in dataset().tensors)] * 7, "made with another kind of loader"),
    ],
)
def test_resuming_with_other_data(data: Any, words: str) -> None:
    finished_run()
    refused_and_untouched(DataError, words, "start a new run in another run_dir", loader=data(), **AGAIN)


def test_resuming_with_a_list_of_another_length() -> None:
    x, y = dataset().tensors
    whole = list(zip(x.split(16), y.split(16), strict=True))
    finished_run(loader=whole)
    refused_and_untouched(
        DataError, "made with 7 batches an epoch, and now there are 6", "the same data", loader=whole[:6], **AGAIN
    )


def test_resuming_with_another_model() -> None:
    finished_run()
    net = linear()
    torch.manual_seed(2)  # that of the run
    refused_and_untouched(
        RunError, "are of another model", "strict=False", "another run_dir", "not in step-00000004: weight", "not in the model: 0.bias, 0.weight, 1.bias",
        net=net, step=loss_step, **AGAIN,
    )  # fmt: skip


def test_resuming_with_other_groups_of_parameters() -> None:
    finished_run()
    net: Any = model()
    groups = [{"params": net[0].parameters()}, {"params": [*net[1].parameters(), *net[4].parameters()]}]
    refused_and_untouched(
        RunError, "had 1 parameter groups of [6] parameters, this one has 2 of [2, 4]",
        net=net, optimizer=AdamW(groups, lr=1e-2), **AGAIN,
    )  # fmt: skip


def test_resuming_with_another_optimizer() -> None:
    finished_run()
    refused_and_untouched(
        RunError, "that was saved is AdamW, and this one is SGD", "sheer.load_weights",
        optimizer=lambda net: SGD(net.parameters(), lr=1e-2), **AGAIN,
    )  # fmt: skip


def test_resuming_with_another_learning_rate() -> None:
    finished_run()
    refused_and_untouched(
        RunError, "lr: 0.01 then, 0.003 now", "Put them back, or start a new run",
        optimizer=lambda net: AdamW(net.parameters(), lr=3e-3), **AGAIN,
    )  # fmt: skip
    net = model()
    assert fit(net=net, optimizer=AdamW(net.parameters(), lr=1e-2, foreach=False), **AGAIN).step == 8


@pytest.mark.parametrize("scheduler", [None, lambda optimizer, total: ExponentialLR(optimizer, 0.9)])
def test_resuming_with_another_scheduler(scheduler: Any) -> None:
    finished_run(scheduler=lambda optimizer, total: StepLR(optimizer, 2))
    refused_and_untouched(
        RunError, "The schedulers that were saved are {'optimizer': 'StepLR'}", scheduler=scheduler, **AGAIN
    )


def test_resuming_a_one_cycle_schedule_in_a_longer_run() -> None:
    how: dict[str, Any] = {"scheduler": lambda optimizer, total: OneCycleLR(optimizer, 0.1, total_steps=total)}
    finished_run(**how)
    refused_and_untouched(ModelError, "The OneCycleLR ends after 4 steps, and the run has 8", **how, **AGAIN)


class Counting:
    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, step: int, model: nn.Module) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_resuming_without_a_callback_that_had_a_state_is_warned_of() -> None:
    finished_run(callbacks=[Counting()])
    with pytest.warns(sheer.SheerWarning, match="the state of Counting, and there is no such callback now"):
        assert fit(**AGAIN).step == 8


def test_a_file_in_place_of_a_folder() -> None:
    Path("run").write_text("notes")
    refused(RunError, "run_dir='run' is a file, and the run needs a folder", "Give another run_dir", run_dir="run")
    assert Path("run").read_text() == "notes"


def test_a_folder_that_cannot_be_made() -> None:
    Path("file").write_text("notes")
    refused(RunError, "The run directory file/run cannot be written", "Give another run_dir", run_dir="file/run")
    Path("runs").write_text("notes")
    refused(RunError, "cannot be made", "Set run_dir")
    assert Path("file").read_text() == Path("runs").read_text() == "notes"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_run_json(content: str) -> None:
    finished_run()
    Path("run/run.json").write_text(content)
    refused_and_untouched(RunError, "run.json is damaged", 'set resume="run" and another run_dir', **AGAIN)
    assert fit(**{**AGAIN, "run_dir": "new", "resume": "run"}).step == 8


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_manifest_is_warned_of_and_the_checkpoint_before_it_is_taken(content: str) -> None:
    finished_run(checkpoint=sheer.Checkpoint(every_n_steps=2, keep_last=2))
    Path("run/checkpoints/step-00000004/manifest.json").write_text(content)
    with pytest.warns(sheer.SheerWarning, match=r"step-00000004/manifest\.json is damaged.* passed over") as told:
        assert fit(**AGAIN).step == 8
    assert len([one for one in told if one.category is sheer.SheerWarning]) == 1


def test_every_checkpoint_damaged() -> None:
    finished_run()
    (Path("run/checkpoints/step-00000004") / "state.json").write_text("{}")
    before = contents("run")
    with pytest.warns(sheer.SheerWarning, match=r"state\.json has 2 bytes"):
        refused(RunError, "No checkpoint in run/checkpoints can be used", "give another run_dir", **AGAIN)
    assert contents("run") == before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", ["There is no file or folder nowhere in /", "Give a checkpoint or a run's directory."]),
        ("Auto", ["There is no file or folder Auto in /", 'set resume="auto"']),
        ("empty", ["empty holds no checkpoint", "Give a run's directory or one of its checkpoints"]),
    ],
)
def test_resuming_from_a_path_without_a_checkpoint(source: str, said: list[str]) -> None:
    Path("empty").mkdir()
    refused(RunError, *said, resume=source)


def test_resuming_from_a_damaged_checkpoint() -> None:
    finished_run()
    path = Path("run/checkpoints/step-00000004/model.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    refused_and_untouched(RunError, "model.safetensors is damaged", "SHA-256", resume="run")
    with pytest.raises(RunError, match=r"model\.safetensors is damaged"):
        sheer.load_weights(model(), "run", "last")


def test_loading_the_weights_of_another_model_lists_all_that_differs() -> None:
    finished_run()
    other = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 1, bias=False))
    other.add_module("head", nn.Linear(1, 1))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(RunError) as error:
        sheer.load_weights(other, "run", "last")
    for words in (
        "not in step-00000004: head.weight, head.bias",
        "not in the model: 4.bias",
        "0.weight is [8, 6] here and [16, 6] there",
        "0.bias is [8] here and [16] there",
    ):
        assert words in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_loading_the_best_where_nothing_was_monitored() -> None:
    finished_run()
    with pytest.raises(RunError, match=r"run has no 'best' checkpoint: was `monitor` set.*There are step-00000004"):
        sheer.load_weights(model(), "run")


def test_loading_weights_from_a_path_without_any() -> None:
    Path("weights.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(RunError, match="no safetensors file, or a damaged one"):
        sheer.load_weights(model(), "weights.safetensors")
    with pytest.raises(RunError, match="There is no file or folder nowhere in /"):
        sheer.load_weights(model(), "nowhere")


def test_testing_the_best_of_no_run() -> None:
    with pytest.raises(RunError, match=r"this trainer has none yet\. Set run_dir, call fit first, or give a path"):
        sheer.Trainer().test(model(), loss_step, loader(), checkpoint="best")


@pytest.mark.parametrize(
    "mistake",
    [
        {"callbacks": [object()]},
        {"monitor": "val/los", "val_loader": [tuple(t[:8] for t in dataset().tensors)]},
        {"step": lambda net, batch: None},
        {"step": lambda net, batch: batch[2]},
        {"optimizer": lambda net: AdamW(linear().parameters())},
    ],
)
def test_a_start_that_failed_leaves_the_folder_free_for_the_next(mistake: dict[str, Any]) -> None:
    """Also one whose first step failed: nobody is to delete a folder in which nothing happened."""
    with pytest.raises((sheer.SheerError, IndexError)):
        fit(run_dir="run", **mistake)
    assert not Path("run").exists()
    assert fit(run_dir="run", max_steps=2).step == 2


def test_of_two_runs_that_start_in_one_folder_at_once_one_is_refused() -> None:
    net = model()
    made = [sheer.Trainer(max_steps=1, run_dir="run") for _ in range(2)]

    class StartsAnother:
        def on_fit_start(self, model: Any, optimizers: Any, info: Any) -> None:
            with pytest.raises(RunError, match="already holds a run"):
                made[1].fit(net, loss_step, loader(), optimizer=AdamW(net.parameters()))

    assert fit(net=net, callbacks=[StartsAnother()], run_dir="run", max_steps=1).step == 1
    assert len(json.loads(Path("run/run.json").read_text())["sessions"]) == 1


def test_going_on_from_a_path_that_is_beyond_the_duration() -> None:
    finished_run()
    refused(
        RunError,
        "max_steps is reached there: nothing would be trained",
        resume="run",
        run_dir="new",
        max_steps=4,
        max_epochs=None,
    )


def test_a_run_of_another_folder_that_was_stopped_goes_on() -> None:
    fit(
        run_dir="run",
        checkpoint=True,
        max_steps=4,
        max_epochs=None,
        callbacks=[sheer.On(step_end=lambda step, model: "enough" if step == 3 else None)],
    )
    result = fit(run_dir="new", resume="run", checkpoint=True, max_steps=6, max_epochs=None)
    assert (result.step, result.stopped_by) == (6, "max_steps")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"callbacks": [sheer.EMA(0.9)]}, {}, "holds the state of EMA, and there is no such callback now"),
        ({}, {"callbacks": [sheer.EMA(0.9)]}, "EMA was not there when the checkpoint was made"),
        (
            {"callbacks": [sheer.EMA(0.9)]},
            {"callbacks": [sheer.EMA(0.5)]},
            r"made with EMA\(decay=0.9\), and go on with decay=0.5",
        ),
        (
            {"hparams": {"width": 8, "depth": 1}},
            {"hparams": {"width": 9, "depth": 1}},
            "other hyper-parameters: width: 8 then, 9 now",
        ),
    ],
)
def test_what_may_change_on_a_resume_is_warned_of(before: dict[str, Any], after: dict[str, Any], said: str) -> None:
    fit(run_dir="run", checkpoint=True, max_steps=2, max_epochs=None, **before)
    with pytest.warns(sheer.SheerWarning, match=said):
        fit(run_dir="run", checkpoint=True, max_steps=4, max_epochs=None, resume="auto", **after)


def by_steps(optimizer: Any, total: int) -> StepLR:
    return StepLR(optimizer, total)


def test_another_length_of_a_schedule_is_warned_of_where_training_goes_on() -> None:
    finished_run(scheduler=by_steps)
    refused_and_untouched(DataError, "now there are 90", scheduler=by_steps, loader=loader(samples=90), **AGAIN)
    assert fit(scheduler=by_steps, **{**AGAIN, "max_steps": 3}).step == 4, "it is over, and goes on nowhere"
    with pytest.warns(sheer.SheerWarning, match="made for 4 steps, and is now made for 8: .* rate may jump"):
        assert fit(scheduler=by_steps, **AGAIN).step == 8


def test_in_a_loop_of_ones_own_too() -> None:
    for steps, over in ((3, False), (2, True), (4, False)):
        net = model()
        sgd = SGD(net.parameters())
        made = trainer(run_dir="run", resume="auto", checkpoint=True, max_steps=steps)
        run = made.start(net, optimizers={"sgd": sgd}, schedulers={"sgd": by_steps})
        message = "made for 3 steps, and is now made for 4"
        with pytest.warns(sheer.SheerWarning, match=message) if steps == 4 else contextlib.nullcontext():
            for batch in run.steps(loader()):
                assert not over
                run.update(sgd, loss_step, batch)
        run.finish()


def fit_with_a_plateau(**how: Any) -> sheer.Result:
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    return fit(net=net, optimizer=optimizer, scheduler=ReduceLROnPlateau(optimizer), **how)


@pytest.mark.parametrize(
    ("start", "how", "said"),
    [
        (fit, {"monitor": "val/loss"}, "by the choice of the best checkpoint. Put it back"),
        (fit, {"callbacks": [sheer.EarlyStopping(9, monitor="val/loss", mode="min")]}, "by EarlyStopping"),
        (fit_with_a_plateau, {"monitor": "val/loss"}, "by the choice of the best checkpoint and ReduceLROnPlateau"),
        (fit, {}, None),  # nothing compares them
    ],
)
def test_validations_on_other_batches_are_warned_of_where_they_are_compared(
    start: Any, how: dict[str, Any], said: str | None
) -> None:
    how = {"val_loader": loader(32, shuffle=False), "run_dir": "run", "checkpoint": True, "resume": "auto", **how}
    start(max_steps=2, limit_val_batches=1, **how)
    assert start(max_steps=2, **how).step == 2, "it is over, and validates nothing"
    message = f"limit_val_batches: 1 then, None now.* {said}"
    with contextlib.nullcontext() if said is None else pytest.warns(sheer.SheerWarning, match=message):
        start(max_steps=4, **how)
    assert start(max_steps=6, **how).step == 6, "as in the session before"


def test_another_seed_on_a_resume_is_warned_of() -> None:
    fit(run_dir="run", checkpoint=True, max_steps=2, max_epochs=None)
    net = model()
    torch.manual_seed(9)
    with pytest.warns(sheer.SheerWarning, match="seed: 2 then, 9 now"):
        fit(net=net, run_dir="run", checkpoint=True, max_steps=4, max_epochs=None, resume="auto")


def test_a_run_that_is_over_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    fit(run_dir="run", checkpoint=True, max_steps=2, max_epochs=None)
    capsys.readouterr()
    fit(run_dir="run", checkpoint=True, max_steps=2, max_epochs=None, resume="auto")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sheer ") and lines[-2].startswith("resumed from")
    assert lines[-1] == "the run is over (max_steps), so nothing is trained; to go on, give it a longer duration"
