"""The `sheer` command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sheer.cli import read_changes
from sheer.errors import ContradictionError, SettingsError
from sheer.settings import Rollback, Settings, overridden

ROOT = Path(__file__).parents[1]

SCRIPT = """
import sys, torch, sheer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import beside  # a module in the script's own folder

model = nn.Linear(2, 1)
loader = DataLoader(TensorDataset(torch.randn(32, 2)), batch_size=4)
trainer = sheer.Trainer(max_steps=int(sys.argv[1]), run_dir="run", checkpoint=sheer.Checkpoint(keep_last=2))
result = trainer.fit(model, lambda m, b: m(b[0]).square().mean(), loader, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
print("steps", result.step, "arguments", sys.argv[1:])
"""


def sheer(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sheer", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_run_sets_settings_and_leaves_the_scripts_own_arguments_to_it() -> None:
    Path("train.py").write_text(SCRIPT)
    Path("beside.py").touch()
    done = sheer("run", "--set", "max_steps=3", "--set", "checkpoint.keep_last=1", "train.py", "7", "--own=1")
    assert "steps 3 arguments ['7', '--own=1']" in done.stdout, done.stderr
    record = json.loads(Path("run/run.json").read_text())
    assert record["settings"]["max_steps"] == 3 and record["settings"]["checkpoint"]["keep_last"] == 1
    changes = ["--set", "max_steps=3", "--set", "checkpoint.keep_last=1"]
    assert record["sessions"][0]["command"][1:] == ["-m", "sheer", "run", *changes, "train.py", "7", "--own=1"]


@pytest.mark.parametrize("command", ["run", "profile", "autotune"])
def test_an_error_of_the_script_is_shown_from_the_scripts_own_lines_on(command: str) -> None:
    failing = 'import torch\ntry:\n    int("x")\nexcept ValueError:\n    raise RuntimeError("no good")\n'
    Path("train.py").write_text(failing)
    done = sheer(command, "train.py")
    assert done.returncode == 1 and "ValueError: invalid literal" in done.stderr
    last = done.stderr.rpartition("Traceback (most recent call last):\n")[2].splitlines()
    files = [line.split('"')[1] for line in last if line.startswith("  File ")]
    assert files[-2:] == [str(ROOT / "sheer" / "__main__.py"), "train.py"], done.stderr
    assert last[-1] == "RuntimeError: no good"


def test_run_names_an_unknown_setting_before_the_script_starts() -> None:
    Path("train.py").write_text("print('started')")
    done = sheer("run", "--set", "max_step=3", "train.py")
    assert done.returncode == 2 and "Did you mean max_steps?" in done.stderr.replace("\n", " ")
    assert "started" not in done.stdout


@pytest.mark.parametrize(("ends", "status"), [("", 0), ("raise SystemExit(3)", 3), ("raise ValueError('no good')", 1)])
def test_run_says_that_nothing_was_set_where_the_script_builds_no_trainer(ends: str, status: int) -> None:
    Path("train.py").write_text(f"import sheer\nprint('started')\n{ends}")
    done = sheer("run", "--set", "max_steps=3", "--set", "precision=bf16-mixed", "train.py")
    said = "--set max_steps=3 --set precision=bf16-mixed set nothing: train.py built no Trainer in this process"
    assert (done.stdout, done.returncode) == ("started\n", status)
    assert (said in done.stderr) is (status != 1), "an error says by itself why the script came no further"
    assert sheer("run", "train.py").stderr == ("" if status != 1 else done.stderr)


def test_run_says_nothing_where_a_trainer_was_built() -> None:
    Path("train.py").write_text("import sheer\nsheer.Trainer(max_steps=7)\nraise SystemExit(4)")
    done = sheer("run", "--set", "max_steps=3", "train.py")
    assert (done.returncode, done.stderr) == (4, "")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("max_steps", "write NAME=VALUE"),
        ("max_steps=ten", "max_steps must be an int or None"),
        ("checkpoint.keep=1", "checkpoint.keep"),
    ],
)
def test_assignments_are_read_strictly(assignment: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_changes([assignment])


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("fast_dev_run=true", "fast_dev_run", True),
        ("max_steps=1e3", "max_steps", 1000),
        ("checkpoint=false", "checkpoint", None),
        ("limit_train_batches=1.0", "limit_train_batches", 1.0),
    ],
)
def test_values_are_read_as_a_shell_writes_them(assignment: str, name: str, value: object) -> None:
    read = getattr(overridden(Settings(), read_changes([assignment])), name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("first", [0, 1])
def test_settings_that_go_together_may_be_set_in_any_order(first: int) -> None:
    given = [("resume", "auto"), ("run_dir", "runs/a")]
    changes = dict([given[first], given[1 - first], ("checkpoint.keep_last", "3"), ("checkpoint.every_n_steps", "7")])
    changed = overridden(Settings(), changes)
    assert (changed.resume, changed.run_dir) == ("auto", "runs/a")
    assert changed.checkpoint is not None
    assert (changed.checkpoint.keep_last, changed.checkpoint.every_n_steps) == (3, 7)


@pytest.mark.parametrize(
    "assignment", ["activation_memory_budget=0.8", "monitor_mode=max", "gradient_clip_algorithm=value", "resume=auto"]
)
def test_what_needs_another_setting_is_left_to_the_script(assignment: str) -> None:
    assert read_changes([assignment]) == dict([assignment.split("=")])
    with pytest.raises(ContradictionError):
        overridden(Settings(), read_changes([assignment]))


def test_a_part_of_a_policy_can_be_set_whatever_the_script_says() -> None:
    for given in (Settings(), Settings(nonfinite=Rollback(max_times=7))):
        changed = overridden(given, read_changes(["nonfinite.spike=4.0"])).nonfinite
        assert isinstance(changed, Rollback) and changed.spike == 4.0
        assert changed.max_times == (7 if isinstance(given.nonfinite, Rollback) else 3)


@pytest.mark.parametrize("name", ["loggers", "callbacks", "hparams.lr"])
def test_objects_are_no_settings(name: str) -> None:
    with pytest.raises(SettingsError, match="are objects, and no settings"):
        read_changes([f"{name}=x"])


def test_a_duration_can_be_set_as_a_clock() -> None:
    assert read_changes(["max_time=00:10:00"]) == {"max_time": "00:10:00"}
