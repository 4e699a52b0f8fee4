"""What eject writes is code that a strict type checker and ruff accept, and that a reviewer sees whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sheer.eject.eject import eject
from tests.eject.scripts import ROWS

ROOT = Path(__file__).parents[2]
WIDER = "NPY002,SIM113,I001"  # NumPy's global state is saved; steps are counted across epochs; the user's imports stay as they are
STRICT = [
    "--strict",
    "--no-error-summary",
    "--hide-error-context",
    "--no-color-output",
    "--untyped-calls-exclude=torch",
]


def own_lines(text: str, script: str) -> set[int]:
    """Return the numbers of the lines that are the user's."""
    user = set(script.splitlines())
    return {number for number, line in enumerate(text.splitlines(), 1) if line in user}


@pytest.mark.parametrize("row", ["plain", "saved often", "goes on", "ema saved", "both", "loop saved", "tensorboard"])
def test_strict_types_and_every_rule_of_ours_hold(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(ROWS[row])
    made = tmp_path / "made.py"
    made.write_text(text := eject(script).text)
    user = own_lines(text, ROWS[row])
    for command in (
        [sys.executable, "-m", "mypy", *STRICT, "--config-file", os.devnull, "made.py"],
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--config",
            str(ROOT / "pyproject.toml"),
            "--extend-ignore",
            WIDER,
            "--output-format",
            "concise",
            "made.py",
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("made.py:")]
        assert [line for line in found if int(line.split(":")[1]) not in user] == [], done.stderr


@pytest.mark.parametrize("row", ["skip", "ignore"])
def test_a_loss_that_nobody_watches_is_not_kept(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(ROWS[row])
    text = eject(script).text
    assert ".backward()" in text
    assert not re.search(r"^\s*(assert\b|[\w.]+\.detach\(\))", text, re.MULTILINE), text
