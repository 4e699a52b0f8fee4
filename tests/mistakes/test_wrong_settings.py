"""Mistakes in the settings: found when they are written down, or when `fit` is called; never after a step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

import sheer
from sheer import SettingsError, Trainer
from tests.mistakes.common import fit, refused
from tests.task import loader, model, step


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ({"max_epoch": 3}, "max_epochs"),
        ({"gradient_clip": 1.0}, "gradient_clip_val"),
        ({"logger": []}, "loggers"),
        ({"accumulate_grad_batch": 2}, "accumulate_grad_batches"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest(given: dict[str, Any], near: str) -> None:
    with pytest.raises(SettingsError, match=f"Trainer has no '{next(iter(given))}'. Did you mean {near}?"):
        Trainer(**given)


def test_a_setting_of_the_compiler_is_told_where_it_goes() -> None:
    given: Any = {"activation_memory_budget": 0.5}
    with pytest.raises(SettingsError, match=r"Give it to the compiler: compile=sheer\.Compile\("):
        Trainer(**given)


def test_an_unknown_part_of_checkpoint_is_refused_by_python() -> None:
    with pytest.raises(TypeError, match="every_n_step"):
        sheer.Checkpoint(every_n_step=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"max_steps": "100"}, "max_steps must be an int or None, not '100'"),
        ({"max_steps": 1.5}, "max_steps must be an int or None, not 1.5"),
        ({"max_epochs": True}, "max_epochs must be an int or None, not True"),
        ({"gradient_clip_val": "1"}, "gradient_clip_val must be a float or None, not '1'"),
        ({"device": 0}, "device must be a string, not 0"),
        ({"deterministic": "yes"}, "deterministic must be True or False, not 'yes'"),
        ({"checkpoint": "runs/a"}, "checkpoint must be a Checkpoint or None, not 'runs/a'"),
        ({"max_time": "ten minutes"}, 'max_time must be a number of seconds or a string such as "00:12:00:00"'),
    ],
)
def test_a_value_of_the_wrong_type(given: dict[str, Any], wanted: str) -> None:
    with pytest.raises(SettingsError) as error:
        Trainer(**given)
    assert wanted in str(error.value)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"max_steps": 0}, "max_steps must be at least 1, not 0"),
        ({"max_epochs": -1}, "max_epochs must be at least 1, not -1"),
        ({"max_time": -5.0}, "max_time must be above 0, not -5.0"),
        ({"gradient_clip_val": 0.0}, "gradient_clip_val must be above 0, not 0.0"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be at least 1"),
        ({"log_every_n_steps": 0}, "log_every_n_steps must be at least 1"),
        (
            {"limit_val_batches": 1.5},
            "as a float is a share, from 0.0 to 1.0, not 1.5. For a number of batches give an int",
        ),
        ({"limit_train_batches": 0}, "leaves nothing to train on"),
    ],
)
def test_a_value_out_of_range(given: dict[str, Any], wanted: str) -> None:
    with pytest.raises(SettingsError) as error:
        Trainer(**given)
    assert wanted in str(error.value)


@pytest.mark.parametrize("value", [0, -1])
def test_checkpoints_of_which_none_is_kept(value: int) -> None:
    with pytest.raises(SettingsError, match="keep_last must be at least 1"):
        sheer.Checkpoint(keep_last=value)


@pytest.mark.parametrize(
    ("given", "near"), [("bf16_mixed", "bf16-mixed"), ("fp16-mixed", "16-mixed"), ("bf16", "bf16-true")]
)
def test_a_misspelt_precision_is_named_with_the_nearest(given: Any, near: str) -> None:
    with pytest.raises(SettingsError, match="precision must be one of") as error:
        Trainer(precision=given)
    assert "did you mean" in str(error.value) and near in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"overfit_batches": 2, "limit_train_batches": 3}, ("overfit_batches=2", "limit_train_batches=3", "Give one")),
        (
            {"fast_dev_run": True, "resume": "old", "run_dir": "run"},
            ("fast_dev_run", "resume", "Leave one of them out"),
        ),
        *(({name: ""}, (f"{name} is empty: give",)) for name in ("run_dir", "resume", "device", "monitor")),
        ({"resume": "auto"}, ('resume="auto"', "run_dir", 'Give run_dir="runs/<a name>"')),
        ({"gradient_clip_algorithm": "value"}, ('gradient_clip_algorithm="value"', "Give gradient_clip_val")),
        ({"monitor_mode": "max"}, ('monitor_mode="max"', "Give monitor=")),
        ({"resume": "auto", "run_dir": "run", "checkpoint": False}, ("checkpoint=False", "Leave one of them out")),
        ({"checkpoint": sheer.Checkpoint(keep_best=3)}, ("keep_best=3", "Give monitor=")),
    ],
)
def test_settings_that_contradict_each_other(given: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as error:
        Trainer(max_steps=3, **given)
    for word in words:
        assert word in str(error.value)


def test_no_duration() -> None:
    with pytest.raises(SettingsError, match="Give max_steps, max_epochs or max_time"):
        Trainer().fit(model(), step, loader(), optimizer=lambda net: None)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("name", ["cuda:99", "hpu"])
def test_a_device_that_does_not_exist(name: str) -> None:
    refused(SettingsError, f"device={name!r} cannot be used on this machine", device=name)


@pytest.mark.parametrize("name", ["gpu", "GPU", "cudda", "cuda0", "0"])
def test_a_word_that_names_no_device(name: str) -> None:
    refused(
        SettingsError, f"device={name!r} is no name of a device", 'torch names them "cuda"', '"mps", "cpu"',
        "Leave device out to take the accelerator that is there", device=name,
    )  # fmt: skip


def test_monitoring_without_a_validation() -> None:
    refused(SettingsError, "monitor='val/loss'", "Give fit a val_loader", monitor="val/loss")


def test_a_monitored_metric_that_no_step_returns_is_named_with_the_nearest() -> None:
    refused(
        SettingsError,
        "monitor='val/eror' is no metric that the validation returned; there are: val/loss, val/error",
        "Did you mean 'val/error'?",
        monitor="val/eror",
        val_loader=loader(32, shuffle=False),
    )


def test_monitoring_a_training_metric() -> None:
    refused(SettingsError, "there are: val/loss", monitor="train/loss", val_loader=loader(32, shuffle=False))


def test_a_share_of_a_loader_without_a_length() -> None:
    x = list(loader())
    refused(
        sheer.DataError,
        "0.5 is a share",
        "Give a number of batches",
        loader=iter(x),
        limit_train_batches=0.5,
        max_epochs=1,
    )


@pytest.mark.parametrize("given", [{"validate_every_n_steps": 5}, {"validate_first": True}])
def test_validating_with_nothing_to_validate_on_is_warned_of(given: dict[str, Any]) -> None:
    with pytest.warns(sheer.SheerWarning, match="do nothing: fit was given no val_loader"):
        assert fit(max_steps=2, **given).step == 2


@pytest.mark.parametrize("hparams", [3, ["lr"], "lr=1"])
def test_hparams_without_names(hparams: Any) -> None:
    refused(SettingsError, "hparams must be a mapping, a dataclass or a namespace", hparams=hparams)


@pytest.mark.parametrize(("monitor", "mode", "warns"), [
    ("val/accuracy", "min", True), ("val/top1_acc", "min", True), ("val/accuracy", "max", False), ("val/acc_loss", "min", False), ("val/loss", "min", False),
])  # fmt: skip
def test_a_metric_that_is_better_when_it_is_higher(monitor: str, mode: Any, warns: bool) -> None:
    name = monitor.removeprefix("val/")

    def measured(net: Any, batch: Any) -> Any:
        loss = step(net, batch)["loss"]
        return {name: loss.detach(), "loss": loss}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(measured, val_loader=loader(), monitor=monitor, monitor_mode=mode, max_steps=1, max_epochs=None)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, sheer.SheerWarning)]
    assert any('set monitor_mode="max"' in message for message in said) is warns
