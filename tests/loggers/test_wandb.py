"""Weights & Biases in its offline mode, read back from the files that `wandb sync` would upload."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from wandb.proto.wandb_internal_pb2 import Record

import sheer
from tests.logging_task import Broken, fit, info


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")


def records(run_dir: str) -> list[list[Record]]:
    """Return what each W&B run's file in a run's folder holds, oldest first.

    W&B's own process writes them, and its finish() can return before the last of it is on the disk.
    """
    for _ in range(200):
        found = [read(path) for path in sorted(Path(run_dir).glob("wandb/offline-run-*/run-*.wandb"))]
        if found and all(any(record.HasField("exit") for record in file) for file in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"a file of W&B in {run_dir} does not end as it should")


def read(path: Path) -> list[Record]:
    """Read W&B's file, which is a LevelDB log: blocks of 32 KiB, of pieces with checksum, length and kind, behind 7 bytes."""
    content, at, whole, out = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            out.append(Record.FromString(whole))
            whole = b""
    return out


def rows(found: list[Record]) -> list[dict[str, Any]]:
    return [
        {
            name: json.loads(item.value_json)
            for item in record.history.item
            if not (name := item.key or "/".join(item.nested_key)).startswith("_")
        }
        for record in found
        if record.HasField("history")
    ]


def config(found: list[Record]) -> dict[str, Any]:
    return {
        update.key or "/".join(update.nested_key): json.loads(update.value_json)
        for record in found
        if record.HasField("run")
        for update in record.run.config.update
    }


def test_metrics_hyper_parameters_and_settings_are_there() -> None:
    logger = sheer.WandB("digits", "first", group="tests", tags=["small"], notes="a try", mode="offline")
    fit("run", logger)
    (found,) = records("run")
    run = next(record.run for record in found if record.HasField("run"))
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("digits", "first", "tests", ["small"])
    assert config(found)["lr"] == 0.01
    assert config(found)["sheer"]["log_every_n_steps"] == 2
    trained = [row for row in rows(found) if "train/loss" in row]
    assert [row["step"] for row in trained] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 21]
    assert [row["step"] for row in rows(found) if "val/loss" in row] == [7, 14, 21]
    assert logger.client.id == run.run_id
    ends = [record.exit.exit_code for record in found if record.HasField("exit")]
    assert ends == [0]


def test_a_resumed_run_is_the_same_wandb_run() -> None:
    fit("run", sheer.WandB(mode="offline"), stop_at=9)
    fit("run", sheer.WandB(mode="offline"))
    first, second = records("run")
    ids = [next(record.run.run_id for record in found if record.HasField("run")) for found in (first, second)]
    assert ids[0] == ids[1]
    assert [row["step"] for row in rows(first) + rows(second) if "train/loss" in row] == [*range(2, 22, 2), 21]


def test_a_start_after_close_goes_on_in_the_same_run_and_anew_in_another() -> None:
    logger = sheer.WandB(mode="offline")
    ids = []
    for run_dir, run_id in (("one", "1"), ("one", "1"), ("two", "2")):
        logger.start(info(run_dir, run_id=run_id))
        ids.append(logger.client.id)
        logger.close()
        logger.close()
    assert ids[0] == ids[1] != ids[2]


def test_two_at_once_are_two_wandb_runs() -> None:
    loggers = [sheer.WandB("one", mode="offline"), sheer.WandB("two", mode="offline")]
    for logger in loggers:
        logger.start(info())
    for number, logger in enumerate(loggers):
        logger.log(1, {"train/loss": float(number)})
        logger.close()
    found = records("run")
    assert sorted(row["train/loss"] for run in found for row in rows(run)) == [0.0, 1.0]


def test_pictures_texts_and_figures_are_shown() -> None:
    from matplotlib.figure import Figure

    logger = sheer.WandB(mode="offline")
    logger.start(info())
    figure = Figure()
    figure.subplots().plot([1, 2])
    media = {"digit": sheer.Image(torch.zeros(4, 5)), "words": sheer.Text("a < b"), "curve": sheer.Figure(figure)}
    logger.log_media(3, media)
    logger.close()
    (row,) = rows(records("run")[0])
    assert (row["digit/height"], row["digit/width"]) == (4, 5)
    assert row["curve/_type"] == "image-file"
    (words,) = Path("run").glob("wandb/offline-run-*/files/media/html/words*.html")
    assert "a &lt; b" in words.read_text()
    assert row["step"] == 3


def test_a_run_that_ends_by_an_error_is_marked_as_failed() -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        fit("run", sheer.WandB(mode="offline"), callbacks=[Broken()])
    (found,) = records("run")
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [1]
