"""Small runs are ejected and run where the library cannot be imported: equal to the library's own, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sheer.eject.check import check
from sheer.eject.eject import eject, eject_to_loop
from tests.eject.scripts import AS_LOOPS, LOADERS, ROWS

WITH_WORKERS = [row for row in ROWS if "num_workers" in ROWS[row]]  # whose processes are forked once more


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.new_processes) if row in WITH_WORKERS else row for row in ROWS]
)
def test_an_ejected_run_is_the_same_run(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    original, made = tmp_path / "train.py", tmp_path / "train_torch.py"
    original.write_text(ROWS[row])
    text = eject(original).text
    own = ("`sheer eject`", '{"sheer": plain(settings)')  # in the head of the file; what a run is called in W&B
    assert "sheer" not in text.replace(own[0], "").replace(own[1], "")
    assert row not in LOADERS or ("class GlobalOrderSource" not in text and "def move(" not in text)
    made.write_text(text)
    found = check(original, made, [], updates=1000)
    assert found.difference is None
    assert found.updates > 1
    assert found.logged > 1 or "fast_dev_run" in ROWS[row]
    noted = [file.with_name(f"{file.name}.json") for file in (original, made)]
    assert ("json.dump" in ROWS[row]) == all(file.exists() for file in noted)
    if noted[0].exists():
        assert json.loads(noted[0].read_text()) == json.loads(noted[1].read_text())


@pytest.mark.parametrize("row", AS_LOOPS)
def test_a_fit_written_out_as_a_loop_is_the_same_run(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    original, made = tmp_path / "train.py", tmp_path / "train_loop.py"
    original.write_text(ROWS[row])
    text = eject_to_loop(original)
    assert ".start(" in text and ".fit(" not in text
    made.write_text(text)
    found = check(original, made, [], updates=1000, blocked="-")
    assert found.difference is None
    assert found.updates > 1 and found.logged > 1
