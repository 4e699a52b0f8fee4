"""TensorBoard, read back with TensorBoard's own reader."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import sheer
from tests.logging_task import fit, info


def read(folder: str) -> Any:
    events = EventAccumulator(folder, size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    return events


def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    events = read(folder)
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_metrics_hyper_parameters_and_settings_are_there() -> None:
    fit("run", sheer.TensorBoard())
    found = scalars("run/tensorboard")
    assert [step for step, _ in found["train/loss"]] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 21]
    assert [step for step, _ in found["val/loss"]] == [7, 14, 21]
    events = read("run/tensorboard")
    start = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info
    assert start.hparams["lr"].number_value == 0.01
    assert start.hparams["data.shuffle"].number_value == 1
    experiment = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    ).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["val/loss"]
    (settings,) = events.Tensors("settings/text_summary")
    assert b'"log_every_n_steps": 2' in settings.tensor_proto.string_val[0]


def test_steps_behind_the_checkpoint_are_hidden_when_a_run_goes_on() -> None:
    fit("whole", sheer.TensorBoard())
    fit("stopped", sheer.TensorBoard(), stop_at=9)
    late = sheer.TensorBoard()  # a process that was killed had logged more than it saved
    late.start(info("stopped", start_step=9))
    late.log(10, {"train/loss": 100.0})
    late.close()
    time.sleep(1.01)  # the reader takes files in the order of the second in their names
    fit("stopped", sheer.TensorBoard())
    assert scalars("stopped/tensorboard") == scalars("whole/tensorboard")


def test_what_was_logged_before_a_checkpoint_is_on_the_disk_with_it() -> None:
    logger = sheer.TensorBoard()
    logger.start(info())
    logger.log(1, {"train/loss": 3.0})
    logger.state_dict()
    assert scalars("run/tensorboard")["train/loss"] == [(1, 3.0)]
    logger.close()


def test_a_start_after_close_adds_to_the_same_run() -> None:
    logger = sheer.TensorBoard()
    for name in ("train/loss", "test/loss"):
        logger.start(info())
        logger.log(1, {name: 3.0})
        logger.close()
        logger.close()
    assert scalars("run/tensorboard") == {"train/loss": [(1, 3.0)], "test/loss": [(1, 3.0)]}


def test_pictures_texts_and_figures_are_shown() -> None:
    from matplotlib.figure import Figure

    logger = sheer.TensorBoard("boards")
    logger.start(info())
    figure = Figure()
    figure.subplots().plot([1, 2])
    media = {"digit": sheer.Image(torch.zeros(4, 5)), "words": sheer.Text("some words"), "curve": sheer.Figure(figure)}
    logger.log_media(3, media)
    logger.close()
    events = read("run/boards")
    (digit,) = events.Images("digit")
    assert (digit.step, digit.height, digit.width) == (3, 4, 5)
    assert events.Images("curve")[0].width > 100
    assert events.Tensors("words/text_summary")[0].tensor_proto.string_val[0] == b"some words"


def test_the_client_is_the_summary_writer() -> None:
    from torch.utils.tensorboard import SummaryWriter

    logger = sheer.TensorBoard()
    logger.start(info())
    assert isinstance(logger.client, SummaryWriter)
    logger.client.add_scalar("mine", 1.0, 5)
    logger.close()
    assert scalars("run/tensorboard")["mine"] == [(5, pytest.approx(1.0))]
