"""MLflow, in its own SQLite store, read back with its client."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sheer
from tests.logging_task import Broken, fit, info

pytestmark = pytest.mark.xdist_group("mlflow")  # what its tests share is made once


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all tests here, which takes a second to make."""
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    with contextlib.chdir(folder):  # where its folder for artifacts goes
        MlflowClient(uri).create_experiment("tests")
    return uri


def saved(logger: sheer.MLflow) -> Any:
    assert logger.client is not None and logger.run_id is not None
    return logger.client.get_run(logger.run_id)


def history(logger: sheer.MLflow, name: str) -> list[tuple[int, float]]:
    assert logger.client is not None and logger.run_id is not None
    return sorted((metric.step, metric.value) for metric in logger.client.get_metric_history(logger.run_id, name))


def artifact(logger: sheer.MLflow, path: str) -> Path:
    return Path(saved(logger).info.artifact_uri, path)


def test_metrics_hyper_parameters_and_settings_are_there(store: str) -> None:
    logger = sheer.MLflow("tests", "first", tracking_uri=store, tags={"size": "small"})
    fit("run", logger)
    run = saved(logger)
    assert (run.info.run_name, run.data.tags["size"], run.info.status) == ("first", "small", "FINISHED")
    assert run.data.tags["mlflow.user"]
    assert run.data.params == {
        "lr": "0.01", "layers": "[6, 16, 1]", "data.samples": "100", "data.shuffle": "True",
    }  # fmt: skip
    assert json.loads(artifact(logger, "settings.json").read_text())["log_every_n_steps"] == 2
    assert [step for step, _ in history(logger, "train/loss")] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 21]
    assert [step for step, _ in history(logger, "val/loss")] == [7, 14, 21]


def test_a_resumed_run_is_the_same_mlflow_run(store: str) -> None:
    whole, first, second = (sheer.MLflow("tests", tracking_uri=store) for _ in range(3))
    fit("whole", whole)
    fit("stopped", first, stop_at=9)
    fit("stopped", second)
    assert first.run_id == second.run_id
    assert history(second, "train/loss") == history(whole, "train/loss")


def test_a_start_after_close_goes_on_in_the_same_run_and_anew_in_another(store: str) -> None:
    logger = sheer.MLflow("tests", tracking_uri=store)
    ids = []
    for run_dir, run_id in (("one", "1"), ("one", "1"), ("two", "2")):
        logger.start(info(run_dir, run_id=run_id))
        assert saved(logger).info.status == "RUNNING"
        ids.append(logger.run_id)
        logger.close()
        logger.close()
    assert ids[0] == ids[1] != ids[2]


def test_an_experiment_that_is_not_there_is_made(store: str) -> None:
    logger = sheer.MLflow("made by the logger", tracking_uri=store)
    logger.start(info())
    logger.close()
    assert logger.client is not None
    assert saved(logger).info.experiment_id == logger.client.get_experiment_by_name("made by the logger").experiment_id


def test_names_and_numbers_of_params_that_mlflow_does_not_take_are_made_to_fit(store: str) -> None:
    logger = sheer.MLflow("tests", tracking_uri=store)
    logger.start(replace(info(), hparams={f"p@{number}": number for number in range(150)}))
    logger.log(1, {"val/top@5": 0.5})
    logger.close()
    assert len(saved(logger).data.params) == 150
    assert history(logger, "val/top_5") == [(1, 0.5)]


def test_pictures_texts_and_figures_are_artifacts(store: str) -> None:
    from matplotlib.figure import Figure

    logger = sheer.MLflow("tests", tracking_uri=store)
    logger.start(info())
    figure = Figure()
    figure.subplots().plot([1, 2])
    media = {
        "val/digit": sheer.Image(torch.zeros(4, 5)),
        "val/words": sheer.Text("a < b"),
        "val/curve": sheer.Figure(figure),
    }
    logger.log_media(3, media)
    logger.close()
    assert artifact(logger, "texts/val/words/00000003.txt").read_text() == "a < b"
    assert artifact(logger, "figures/val/curve/00000003.png").stat().st_size > 1000
    assert len(list(artifact(logger, "images").glob("val~digit+step+3+*.png"))) == 1


def test_a_run_that_ends_by_an_error_is_marked_as_failed(store: str) -> None:
    logger = sheer.MLflow("tests", tracking_uri=store)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit("run", logger, callbacks=[Broken()])
    assert saved(logger).info.status == "FAILED"


def test_a_server_that_cannot_be_reached_does_not_stop_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(sheer.SheerWarning, match=r"MLflow\.start failed"):
        fit("run", sheer.MLflow(tracking_uri="http://127.0.0.1:9"))
    assert Path("run/metrics.jsonl").read_text().count("train/loss") == 11
