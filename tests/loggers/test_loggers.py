"""What holds for all loggers: one that fails does not stop a training, media find those that show them, several work at once."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import sheer
from sheer.events import RunInfo
from sheer.loggers.base import Logger, Loggers
from sheer.loggers.values import flattened, pixels
from tests.logging_task import fit, info


class Failing:
    """Raises in one of its methods, and counts its calls."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.calls: list[str] = []

    def _called(self, method: str) -> None:
        self.calls.append(method)
        if method == self.where:
            raise ConnectionError("no route to host")

    def start(self, info: RunInfo) -> None:
        self._called("start")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._called("log")

    def log_media(self, step: int, media: Mapping[str, Any]) -> None:
        self._called("log_media")

    def close(self) -> None:
        self._called("close")

    def state_dict(self) -> dict[str, Any]:
        self._called("state_dict")
        return {"calls": len(self.calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._called("load_state_dict")


@pytest.mark.parametrize("where", ["start", "log", "close", "state_dict"])
def test_a_logger_that_fails_is_warned_of_once_and_the_run_is_the_same(where: str) -> None:
    fit("whole")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit("run", Failing(where))
    said = [str(w.message) for w in caught if issubclass(w.category, sheer.SheerWarning)]
    assert len(said) == 1
    assert f"Failing.{where} failed, and training goes on: ConnectionError: no route to host." in said[0]
    assert untimed("run") == untimed("whole")


def untimed(folder: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def test_one_that_cannot_start_is_left_alone_and_closed() -> None:
    logger = Failing("start")
    loggers = Loggers([logger])
    with pytest.warns(sheer.SheerWarning, match="It gets nothing from this run"):
        loggers.start(info())
    loggers.log(1, {"train/loss": 1.0})
    loggers.close()
    assert logger.calls == ["start", "close"]


def test_one_that_cannot_log_is_tried_again() -> None:
    logger = Failing("log")
    loggers = Loggers([logger])
    loggers.start(info())
    with pytest.warns(sheer.SheerWarning, match="tried again"):
        loggers.log(1, {"train/loss": 1.0})
    loggers.log(2, {"train/loss": 1.0})
    assert logger.calls == ["start", "log", "log"]


def test_the_last_state_is_kept_of_one_that_cannot_give_its_state() -> None:
    logger = Failing("")
    loggers = Loggers([logger])
    before = loggers.state_dict()
    logger.where = "state_dict"
    with pytest.warns(sheer.SheerWarning, match="saved with the last state it gave"):
        assert loggers.state_dict() == before == {"Failing": {"calls": 1}}


def test_one_that_cannot_take_its_state_back_does_not_stop_the_others() -> None:
    jsonl = sheer.JSONL()
    loggers = Loggers([Failing("load_state_dict"), jsonl])
    with pytest.warns(sheer.SheerWarning, match="may log anew"):
        loggers.load_state_dict({"Failing": {}, "JSONL": {"run": "run-1", "size": 7}})
    assert jsonl.state_dict() == {"run": "run-1", "size": 7, "sha256": None}


def test_media_that_no_logger_shows_are_said_once_a_kind() -> None:
    loggers = Loggers([sheer.JSONL(), sheer.CSV()])
    loggers.start(info())
    with pytest.warns(sheer.SheerWarning, match="JSONL and CSV cannot show images, so 'val/digit' is dropped"):
        loggers.log_media(1, {"val/digit": sheer.Image(torch.zeros(4, 4))})
    loggers.log_media(2, {"val/digit": sheer.Image(torch.zeros(4, 4))})
    with pytest.warns(sheer.SheerWarning, match="cannot show texts"):
        loggers.log_media(2, {"val/words": sheer.Text("words")})
    loggers.close()


def test_media_that_a_logger_shows_are_not_complained_of_for_the_others() -> None:
    loggers = Loggers([sheer.CSV(), Failing("")])
    loggers.start(info())
    loggers.log_media(1, {"val/digit": sheer.Image(torch.zeros(4, 4))})
    loggers.close()


def test_figures_are_closed_when_all_loggers_have_them() -> None:
    from matplotlib import pyplot

    loggers = Loggers([sheer.CSV(), Failing("")])
    loggers.start(info())
    loggers.log_media(1, {"val/curve": sheer.Figure(pyplot.figure())})
    loggers.close()
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("shape", [(6, 5), (1, 6, 5), (3, 6, 5), (6, 5, 3), (6, 5, 1)])
def test_pictures_of_all_shapes_become_bytes_with_channels_last(shape: tuple[int, ...]) -> None:
    channels = 3 if 3 in shape else 1
    array = pixels(sheer.Image(torch.full(shape, 0.5, dtype=torch.bfloat16)))
    assert array.shape == (6, 5, channels)
    assert (array == 128).all()


def test_a_batch_is_no_picture() -> None:
    with pytest.raises(sheer.StepError, match=r"shape \[8, 3, 4, 4\]"):
        pixels(sheer.Image(torch.zeros(8, 3, 4, 4)))


def test_nested_hyper_parameters_are_named_by_their_path() -> None:
    assert flattened({"a": 1, "b": {"c": [1, 2], "d": None}}) == {"a": 1, "b.c": "[1, 2]", "b.d": "None"}


def test_all_are_loggers_and_may_be_asked_for_their_state_and_closed_before_the_start() -> None:
    for logger in (sheer.JSONL(), sheer.CSV(), sheer.TensorBoard(), sheer.WandB(), sheer.MLflow()):
        assert isinstance(logger, Logger)
        assert logger.client is None
        logger.close()
        assert json.loads(json.dumps(logger.state_dict()))["run"] is None


@pytest.mark.parametrize(("package", "make"), [("wandb", sheer.WandB), ("mlflow", sheer.MLflow)])
def test_a_missing_package_is_said_at_once_with_the_way_to_install_it(
    package: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, f"{package}.tracking", None)
    with pytest.raises(sheer.MissingPackageError, match=rf'pip install "sheer\[{package}\]"'):
        make()


def test_importing_sheer_imports_no_logging_library() -> None:
    code = "import sheer, sys; print(*{'wandb', 'mlflow', 'tensorboard', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
