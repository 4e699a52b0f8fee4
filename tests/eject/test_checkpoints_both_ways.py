"""A run goes on from a checkpoint of the other: the ejected script from the library's, the library from the script's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sheer
from sheer.eject.eject import eject
from tests.eject.scripts import CALL, script

pytestmark = pytest.mark.xdist_group("checkpoints_both_ways")  # what its tests share is made once

ROOT = Path(sheer.__file__).parents[1]
SETTINGS = (
    "monitor='val/loss', resume='auto', run_dir='run', log_every_n_steps=4, gradient_clip_val=1.0, "
    "callbacks=[sheer.EMA(0.9), sheer.EarlyStopping(patience=9)], loggers=[sheer.CSV()]"
)
LIMITS = ("max_steps=7", "max_steps=15")  # the first ends in the middle of an epoch


def run(file: Path, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(file)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def outcome(folder: Path) -> tuple[bytes, bytes, list[dict[str, float]]]:
    last = folder / "run/checkpoints/last"
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    return (last / "model.safetensors").read_bytes(), (last / "training.safetensors").read_bytes(), lines


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """The two scripts, of a short and a long run, and what they eject to."""
    folder = tmp_path_factory.mktemp("scripts")
    made: dict[tuple[str, int], Path] = {}
    for part, limit in enumerate(LIMITS):
        made["library", part] = folder / f"train_{part}.py"
        made["library", part].write_text(
            script(f"{limit}, {SETTINGS}", f"{CALL}, scheduler=sheer.warmup_linear(warmup_steps=3)")
        )
        made["ejected", part] = folder / f"ejected_{part}.py"
        made["ejected", part].write_text(eject(made["library", part]).text)
    return made


@pytest.mark.parametrize(("first", "second"), [("library", "ejected"), ("ejected", "library"), ("ejected", "ejected")])
def test_a_run_goes_on_from_the_other(
    files: dict[tuple[str, int], Path], tmp_path: Path, first: str, second: str
) -> None:
    for folder, kinds in ((tmp_path / "reference", ("library", "library")), (tmp_path / "mixed", (first, second))):
        folder.mkdir()
        for part, kind in enumerate(kinds):
            run(files[kind, part], folder)
    reference, mixed = outcome(tmp_path / "reference"), outcome(tmp_path / "mixed")
    assert mixed[0] == reference[0]
    assert mixed[1] == reference[1]
    assert mixed[2] == reference[2]
