"""A run goes on from a checkpoint of the other: the ejected script from the library's, the library from the script's."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import sheer
from sheer.eject.eject import eject
from tests import forked
from tests.eject.scripts import CALL, READ_ALIKE, ROWS, script

pytestmark = pytest.mark.xdist_group("checkpoints_both_ways")  # what its tests share is made once

ROOT = Path(sheer.__file__).parents[1]
SETTINGS = (
    "monitor='val/loss', resume='auto', run_dir='run', log_every_n_steps=4, gradient_clip_val=1.0, "
    "callbacks=[sheer.EMA(0.9), sheer.EarlyStopping(patience=9)], loggers=[sheer.CSV()]"
)
LIMITS = ("max_steps=7", "max_steps=15")  # the first ends in the middle of an epoch


def run(file: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(file)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def run_forked(file: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        done = forked.run([sys.executable, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def outcome(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    last = folder / "checkpoints/last"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    held = {
        f"{file.stem} {name.lstrip('/')}": value.tolist()
        for file in last.glob("*.safetensors")
        for name, value in load_file(file).items()
    }
    text = (last / "state.json").read_text().replace('{"$tensor": "/', '{"$tensor": "')  # each names its tensors alike
    state = json.loads(text)
    return {**held, "python": state["random"]["python"], "data": state["data"]}, lines


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
        for part, kind in enumerate(kinds):
            run(files[kind, part], folder)
    assert outcome(tmp_path / "mixed/run") == outcome(tmp_path / "reference/run")


def endings(text: str, folder: Path, first: int, last: int) -> dict[str, Any]:
    """Return how a script ends at step `last`, by who made the steps up to `first` and who the others; its text has `max_steps=last`."""
    original = folder / "train.py"
    original.write_text(text)
    texts = {"library": text, "ejected": eject(original).text}
    start = run if "num_workers" in text else run_forked  # workers would be forked once more
    limit = re.compile(f"(max_steps=|MAX_STEPS = ){last}")

    def part(kind: str, where: str, end: int) -> None:
        file = folder / f"{kind}_{end}.py"
        file.write_text(limit.sub(lambda found: found[1] + str(end), texts[kind]))
        start(file, folder / where)

    ends: dict[str, Any] = {}
    for begins in texts:
        part(begins, begins, first)
        for goes_on in texts:
            where = f"{begins}, {goes_on}"
            shutil.copytree(folder / begins, folder / where, symlinks=True)
            part(goes_on, where, last)
            ends[where] = outcome(folder / where / "runs/here")
    return ends


OTHER_LOADERS = [
    "in order, saved",
    "drawn by this process",
    "one loader for all",
    "drawn by workers",
    "persistent workers",
    *READ_ALIKE,
]


@pytest.mark.parametrize("loader", OTHER_LOADERS)
def test_a_run_goes_on_from_the_other_whatever_its_loader(loader: str, tmp_path: Path) -> None:
    ends = endings(ROWS[loader], tmp_path, 8, 15)  # 8: in the middle of an epoch
    for end in ends.values():
        assert end == ends["library, library"]
