"""The tasks of docs/comparison.md: every script runs, learns, logs, keeps the last and the best, and goes on where it was."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "docs" / "tasks"
LEARNT = {"digits": (0.8, 1.0), "gan": (0.0, 1.6), "lora": (3.0, 5.6), "gpt": (1.5, 2.6), "lstm": (0.4, 1.0)}
LEFT = {
    "pytorch": ("last.pt", "best*", "metrics.jsonl"),
    "accelerate": ("last/random_states_0.pkl", "best/model.safetensors", "metrics.jsonl"),
    "lightning": ("last.ckpt", "epoch=*.ckpt", "lightning_logs/version_1/metrics.csv"),
    "transformers": ("checkpoint-*/trainer_state.json",),
    "sheer": ("checkpoints/last/manifest.json", "checkpoints/best/manifest.json", "metrics.jsonl"),
}


@pytest.mark.parametrize(
    "frameworks", [["pytorch"], ["lightning"], ["accelerate", "transformers"], ["sheer"]], ids=lambda names: names[-1]
)
def test_the_tasks_of_a_framework_learn_and_go_on_where_they_were(frameworks: list[str]) -> None:
    """One epoch, then the same script for two: it makes as many updates as the first time, which are those of one epoch."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.run_tasks", *frameworks]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(Path("report.json").read_text())
    assert len(report) == sum(len(list(TASKS.glob(f"*/with_{name}.py"))) for name in frameworks) > 0
    for run, (first, second) in report.items():
        task, framework = run.split("-")
        assert first["updates"] == second["updates"] > 0, run
        assert first["updates"] == UPDATES[task], run
        low, high = LEARNT[task]
        assert low <= float(second["printed"].split()[-1]) <= high, f"{run}: {second['printed']}"
        for pattern in LEFT[framework]:
            assert any(Path("runs", run).glob(pattern)), f"{run} left no {pattern}"


UPDATES = {"digits": 23, "gan": 32, "gpt": 43, "lora": 16, "lstm": 30}
"""Of an epoch, on one rank: as the numbers of samples and batch sizes say, and as the test above has seen them."""


@pytest.mark.xdist_group("tasks on ranks")
@pytest.mark.parametrize(
    "frameworks", [["pytorch"], ["lightning"], ["accelerate", "transformers"], ["sheer"]], ids=lambda names: names[-1]
)
def test_the_tasks_of_a_framework_run_on_four_ranks(frameworks: list[str]) -> None:
    """With the lines that the table counts, an epoch makes as many updates as on one rank."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true"}  # without a GPU it would take each rank for one alone
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [*launcher, "-m", "tests.run_tasks", *frameworks]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(Path("report.json").read_text())
    assert len(report) == sum(len(list(TASKS.glob(f"*/with_{name}.py"))) for name in frameworks) > 0
    for run, (only,) in report.items():
        task, framework = run.split("-")
        assert only["updates"] == UPDATES[task], run
        assert math.isfinite(float(only["printed"].split()[-1])), run
        for pattern in LEFT[framework]:
            pattern = pattern.replace("version_1", "version_0")
            assert any(Path("runs", run).glob(pattern)), f"{run} left no {pattern}"


def test_lines_that_change_are_counted_as_a_person_would() -> None:
    sys.path.insert(0, str(TASKS))
    import count

    one = "a = 1\nf(\n    a,\n    b=2\n)\n# c\nsave(a)\n"
    assert count.changed_lines(one, one.replace("# c\n", "# another\n\n")) == 0
    assert count.changed_lines(one, one.replace("b=2", "b=2,")) == 0
    assert count.changed_lines(one, one.replace("b=2", "b=3")) == 1
    assert count.changed_lines(one, one.replace("b=2", "b=2,\n    c=3")) == 1
    assert count.changed_lines(one, one.replace("save(a)", "if main:\n    save(a)")) == 1
    assert count.changed_lines(one, one.replace("a = 1", "a = 2\nb = 3")) == 2


def test_the_table_of_lines_is_that_of_the_scripts() -> None:
    sys.path.insert(0, str(TASKS))
    import count

    page = ROOT / "docs" / "comparison.md"
    assert count.filled(page.read_text()) == page.read_text(), "run `python docs/tasks/count.py`"
    assert count.table() in page.read_text() and count.table_of_ranks() in page.read_text()
