"""JSONL and CSV: whole lines, on a full disk too; each step once, in a resumed run too."""

from __future__ import annotations

import contextlib
import csv
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sheer
from sheer.loggers.base import Loggers
from tests.logging_task import fit, info


@contextlib.contextmanager
def full_disk(at: int) -> Iterator[None]:
    """No file can grow beyond `at` bytes: a write that crosses it writes a part, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def test_a_resumed_run_has_each_line_and_row_once() -> None:
    fit("whole", sheer.CSV())
    for stop in (3, 8, 15):
        fit("stopped", sheer.CSV(), stop_at=stop)
    fit("stopped", sheer.CSV())
    whole, stopped = Path("whole"), Path("stopped")
    assert without_time(rows_of(stopped / "metrics.csv")) == without_time(rows_of(whole / "metrics.csv"))
    assert without_time(lines_of(stopped / "metrics.jsonl")) == without_time(lines_of(whole / "metrics.jsonl"))
    steps = [int(row["step"]) for row in rows_of(stopped / "metrics.csv") if row["train/loss"]]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 21]


@pytest.mark.parametrize("make", [sheer.JSONL, sheer.CSV])
def test_what_was_written_after_the_checkpoint_is_cut_off(make: Any) -> None:
    logger = make()
    logger.start(info())
    logger.log(1, {"epoch": 0, "train/loss": 3.0})
    before, state = logger.client.read_text(), logger.state_dict()
    logger.log(2, {"epoch": 0, "train/loss": 2.0, "val/loss": 2.5})
    logger.close()
    resumed = make()
    resumed.load_state_dict(state)
    resumed.start(info(start_step=1))
    assert resumed.client.read_text() == before
    resumed.close()


@pytest.mark.parametrize("make", [sheer.JSONL, sheer.CSV])
def test_a_start_after_close_goes_on_in_the_same_run_and_anew_in_another(make: Any) -> None:
    logger = make()
    for run_dir, run_id, step in (("one", "1", 1), ("one", "1", 2), ("two", "2", 1)):
        logger.start(info(run_dir, run_id=run_id))
        logger.log(step, {"epoch": 0, "train/loss": 3.0})
        logger.close()
        logger.close()
    assert Path("one", logger.file).read_text().count("3.0") == 2
    assert Path("two", logger.file).read_text().count("3.0") == 1


@pytest.mark.parametrize("make", [sheer.JSONL, sheer.CSV])
def test_a_full_disk_leaves_no_torn_line_and_logging_goes_on_when_there_is_room(make: Any) -> None:
    logger = make()
    loggers = Loggers([logger])
    loggers.start(info())
    loggers.log(1, {"epoch": 0, "train/loss": 3.0})
    with full_disk(logger.client.stat().st_size + 10), pytest.warns(sheer.SheerWarning, match="File too large"):
        loggers.log(2, {"epoch": 0, "train/loss": 2.0})
    loggers.log(3, {"epoch": 0, "train/loss": 1.0})
    loggers.close()
    records: Any = lines_of(logger.client) if make is sheer.JSONL else rows_of(logger.client)
    assert [int(record["step"]) for record in records] == [1, 3]


def test_a_disk_that_is_full_at_the_end_leaves_whole_lines() -> None:
    logger = sheer.JSONL()
    logger.start(info())
    logger.log(1, {"train/loss": 3.0})
    assert logger.client is not None
    with full_disk(logger.client.stat().st_size + 10), pytest.raises(OSError):
        logger.log(2, {"train/loss": 2.0})
    logger.close()
    assert [line["step"] for line in lines_of(logger.client)] == [1]


def test_columns_that_come_later_have_empty_cells_before_even_when_the_disk_was_full_then() -> None:
    logger = sheer.CSV()
    logger.start(info())
    logger.log(1, {"epoch": 0, "train/loss": 3.0})
    assert logger.client is not None
    with full_disk(40), pytest.raises(OSError):
        logger.log(2, {"epoch": 0, "val/loss, all": 2.5})
    assert len(rows_of(logger.client)) == 1
    logger.log(2, {"epoch": 0, "val/loss, all": 2.5})
    logger.close()
    first, second = rows_of(logger.client)
    assert list(first) == ["step", "time", "epoch", "train/loss", "val/loss, all"]
    assert (first["train/loss"], first["val/loss, all"]) == ("3.0", "")
    assert (second["train/loss"], second["val/loss, all"]) == ("", "2.5")


@pytest.mark.parametrize("make", [sheer.JSONL, sheer.CSV])
def test_a_file_shorter_than_the_checkpoint_says_keeps_its_whole_lines(make: Any) -> None:
    logger = make()
    logger.start(info())
    for step in (1, 2):
        logger.log(step, {"epoch": 0, "train/loss": 3.0})
    state = logger.state_dict()
    logger.close()
    logger.client.write_bytes(logger.client.read_bytes()[:-5])  # as a power failure may leave it
    resumed = make()
    resumed.load_state_dict(state)
    with pytest.warns(sheer.SheerWarning, match=f"{logger.file} is damaged or was edited"):
        resumed.start(info(start_step=2))
    resumed.log(3, {"epoch": 0, "train/loss": 1.0})
    resumed.close()
    records: Any = lines_of(logger.client) if make is sheer.JSONL else rows_of(logger.client)
    assert [int(record["step"]) for record in records] == [1, 3]


def with_flipped_bit(path: Path) -> None:
    """Flip a bit of a number in the first of the lines."""
    content = bytearray(path.read_bytes())
    content[content.index(b"3.0")] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("make", [sheer.JSONL, sheer.CSV])
def test_a_flipped_bit_in_a_line_that_a_checkpoint_has_counted_is_warned_of_once(make: Any) -> None:
    logger = make()
    logger.start(info())
    for step in (1, 2):
        logger.log(step, {"epoch": 0, "train/loss": 3.0})
    state = logger.state_dict()
    logger.log(3, {"epoch": 0, "train/loss": 2.0, "val/loss": 1.0})  # one column more, which is cut off again
    logger.close()
    for flip in (False, True):
        if flip:
            with_flipped_bit(logger.client)
        resumed = make()
        resumed.load_state_dict(state)
        with pytest.warns() if flip else contextlib.nullcontext() as warned:
            resumed.start(info(start_step=2))
        assert warned is None or [str(one.message).split(":")[0] for one in warned] == [
            f"run/{logger.file} is damaged or was edited"
        ]
        resumed.log(3, {"epoch": 0, "train/loss": 2.0})
        state = resumed.state_dict() if flip else state
        resumed.close()
    again = make()  # from a checkpoint of after that: it was told
    again.load_state_dict(state)
    again.start(info(start_step=3))
    again.close()


@pytest.mark.parametrize("make", [sheer.JSONL, sheer.CSV])
def test_a_state_without_a_hash_and_a_folder_without_the_log_are_no_reason_to_warn(make: Any) -> None:
    logger = make()
    logger.start(info())
    logger.log(1, {"epoch": 0, "train/loss": 3.0})
    logger.close()
    state = logger.state_dict()
    older = {name: value for name, value in state.items() if name != "sha256"}  # as the ejected scripts write it
    for given, folder in ((older, "run"), (state, "on-another-machine")):
        resumed = make()
        resumed.load_state_dict(given)
        resumed.start(info(folder, start_step=1))
        resumed.close()


def test_a_run_goes_on_with_a_damaged_log_and_says_which() -> None:
    fit("whole", sheer.CSV())
    fit("stopped", sheer.CSV(), stop_at=8)
    log = Path("stopped", "metrics.jsonl")
    log.write_text(log.read_text().replace('"epoch": 0', '"epoch": 5', 1))
    with pytest.warns(sheer.SheerWarning, match=r"metrics\.jsonl is damaged or was edited: its lines up to step 8 are"):
        fit("stopped", sheer.CSV())
    assert without_time(lines_of(log))[1:] == without_time(lines_of(Path("whole", "metrics.jsonl")))[1:]


@pytest.mark.parametrize("empty", [False, True])
def test_a_run_goes_on_without_its_log_and_says_which(empty: bool) -> None:
    fit("whole", sheer.CSV())
    fit("stopped", sheer.CSV(), stop_at=8)
    for file in ("metrics.jsonl", "metrics.csv"):
        Path("stopped", file).unlink()
        if empty:
            Path("stopped", file).touch()
    with pytest.warns(sheer.SheerWarning) as warned:
        fit("stopped", sheer.CSV())
    assert [str(one.message).split(", which")[0] for one in warned] == [
        f"stopped/{file} is gone, and with it all lines up to step 8" for file in ("metrics.jsonl", "metrics.csv")
    ]
    steps = [line["step"] for line in lines_of(Path("stopped", "metrics.jsonl"))]
    assert steps == [line["step"] for line in lines_of(Path("whole", "metrics.jsonl")) if line["step"] > 8]
    fit("stopped", sheer.CSV())  # it is over, and writes nothing


def test_a_log_that_no_line_was_in_is_not_missed() -> None:
    fit("stopped", stop_at=1)
    Path("stopped/metrics.jsonl").unlink()
    fit("stopped")


def test_two_of_the_same_kind_write_two_files() -> None:
    fit("run", sheer.CSV(), sheer.CSV("copy.csv"))
    assert Path("run/copy.csv").read_text().count("\n") == Path("run/metrics.csv").read_text().count("\n") > 10
