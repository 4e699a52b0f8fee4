"""A run on several ranks stops as one: by a signal to any of them, by the clock, by a callback; and ends as one by an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import sheer
from tests.distributed.task import Net, step, train
from tests.ranks import run_on_ranks

SCRIPT = """
import os, pathlib, signal, sys, time
import sheer, torch
sys.path.insert(0, {root!r})
from tests.distributed.task import Net, data, step
from torch.utils.data import DataLoader

def slowly(model, batch):
    time.sleep(0.02)
    return step(model, batch)

class Act:
    def on_step_start(self, step, model, batch):
        {act}

model = Net()
trainer = sheer.Trainer(max_steps={steps}, precision="64-true", run_dir="run", resume={resume!r}, callbacks=[Act()], parallel={parallel!r}, log_every_n_steps=10)
result = trainer.fit(model, slowly, DataLoader(data(), 16, shuffle=True), optimizer=torch.optim.SGD(model.parameters(), 0.1))
print("behind fit", trainer.rank, result.step, flush=True)
"""
ROOT = str(Path(__file__).parents[2])
PARALLEL = "sheer.Parallel(dp_replicate=-1, dp_shard=1, timeout=6.0)"


def write(act: str, *, steps: int = 400, resume: str | None = None, parallel: str = "ddp") -> Path:
    text = SCRIPT.format(root=ROOT, act=act, steps=steps, resume=resume, parallel=parallel)
    script = Path("train.py")
    script.write_text(text.replace(f"parallel={parallel!r}", f"parallel={parallel}") if "sheer." in parallel else text)
    return script


def started(script: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sheer", "run", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(act: str, parallel: str = "ddp") -> subprocess.CompletedProcess[str]:
    process = started(write(act, parallel=parallel))
    out, error = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def wait_for_more(file: Path, size: int) -> None:
    end = time.monotonic() + 60
    while not file.exists() or file.stat().st_size <= size:
        assert time.monotonic() < end, f"nothing came to {file}"
        time.sleep(0.1)


def test_a_signal_to_one_rank_or_to_the_launcher_stops_all_at_the_same_step_and_the_run_goes_on() -> None:
    told = "os.kill(os.getpid(), signal.SIGTERM) if trainer.rank == 1 and step == 7 else None"
    done = run(told)
    assert done.returncode == 85, done.stderr
    assert "behind fit" not in done.stdout
    first = json.loads(Path("run/checkpoints/last/manifest.json").read_text())["step"]
    assert 7 <= first < 400
    assert f"stopped by SIGTERM after step {first}, saved in run/checkpoints/last" in done.stderr
    process = started(write("pass", steps=2000, resume="auto"))
    log = Path("run/metrics.jsonl")
    wait_for_more(log, log.stat().st_size if log.exists() else 0)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 85, error
    assert "behind fit" not in out
    second = json.loads(Path("run/checkpoints/last/manifest.json").read_text())["step"]
    assert second > first and f"stopped by SIGINT after step {second}, saved" in error
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_an_error_of_one_rank_is_shown_once_and_ends_all() -> None:
    """Also one that waits for nothing, and is not told by a broken connection."""
    act = "pathlib.Path(f'process-{trainer.rank}').write_text(str(os.getpid())) if step == 4 else None"
    failing = (
        "time.sleep(1000) if trainer.rank == 0 and step == 5 else 1 / 0 if trainer.rank == 1 and step == 5 else None"
    )
    done = run(f"{act}; {failing}")
    assert done.returncode == 1
    shown = done.stderr.partition("Rank 1 failed:\n")[2]
    assert shown.startswith('Traceback (most recent call last):\n  File "train.py", line ')
    assert (done.stdout + done.stderr).count("ZeroDivisionError") == 1 and "Rank 0 failed" not in done.stderr
    assert shown.splitlines()[-1].startswith("In step 5; its batch:")
    assert "Connection closed" not in done.stderr
    assert "ZeroDivisionError" in Path("run/ranks/rank-1.txt").read_text()
    assert not any(Path(f"/proc/{Path(f'process-{rank}').read_text()}").exists() for rank in range(2))


def test_a_rank_that_hangs_is_named_within_the_time_out() -> None:
    done = run("time.sleep(1000) if trainer.rank == 1 and step == 5 else None", parallel=PARALLEL)
    assert done.returncode == 1
    assert "Rank 1 hangs: in step 5, at train.py:" in done.stderr
    assert "Rank 0 waits in" in done.stderr and "was not finished within 6 s" in done.stderr
    assert done.stderr.count("Traceback") == 1


def after_a_while() -> tuple[int, str]:
    """Each rank's clock is its own, and one of them is asked by a callback, too."""
    began = time.monotonic()

    def slow(model: Any, batch: Any) -> torch.Tensor:
        time.sleep(0.01)
        return model(batch[0]).square().mean()

    result = train("ddp", run_step=slow, max_steps=None, max_time=1.0, val_loader=lambda d: None)
    assert time.monotonic() - began < 60
    return result["step"], result["stopped_by"]


def test_the_clock_of_any_rank_stops_all() -> None:
    first, second = run_on_ranks(2, after_a_while)
    assert first == second and first[1] == "max_time"


def asked_by_a_callback() -> tuple[int, str]:
    def ask(step: int, model: Any) -> str | None:
        time.sleep(0.01)
        return "enough" if step >= 5 and int(os.environ["RANK"]) == 1 else None

    result = train("ddp", max_steps=5000, callbacks=[sheer.On(step_end=ask)], val_loader=lambda d: None)
    return result["step"], result["stopped_by"]


def test_a_callback_of_one_rank_stops_all() -> None:
    first, second = run_on_ranks(2, asked_by_a_callback)
    assert first == second and first[1] == "enough" and 5 <= first[0] < 5000


def told_in_a_validation(parallel: Any) -> tuple[int, int, int, dict[str, Any], dict[str, Any]]:
    """Tell one rank to stop in the middle of a validation; return where that left it, and the runs with and without the stop."""
    evaluated, told = 0, False

    def slow(model: Any, batch: Any) -> Any:
        nonlocal evaluated
        if not model.training and told:
            evaluated += 1
            if evaluated == 5 and int(os.environ["RANK"]) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.15)
        return step(model, batch)

    def run(folder: str) -> dict[str, Any]:
        return train(
            parallel,
            run_step=slow,
            max_steps=6,
            validate_every_n_steps=3,
            val_loader=lambda dataset: DataLoader(dataset, batch_size=1),  # 100 batches
            limit_val_batches=99,  # one rank has 50, the other 49
            make=lambda: torch.nn.Sequential(Net(), torch.nn.Dropout(0.2)),
            folder=folder,
            checkpoint=True,
            resume="auto",
        )

    whole = run("runs/whole")
    told = True
    status = 0
    try:
        run("runs/here")
    except SystemExit as left:
        status = int(left.code or 0) + 1000
    told = False
    state = json.loads(Path("runs/here/checkpoints/last/manifest.json").read_text())
    return status, evaluated, state["step"], run("runs/here"), whole


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_validation_is_left_at_the_same_batch_by_all_ranks_and_run_again_whole(parallel: str) -> None:
    ends = run_on_ranks(2, told_in_a_validation, parallel)
    for status, evaluated, saved_at, again, whole in ends:
        assert status == 1000, "0 is what tells the launcher that all is well"
        assert 5 <= evaluated < 49 and evaluated == ends[0][1]
        assert saved_at == 3
        assert again["lines"] == whole["lines"] and again["metrics"] == whole["metrics"]
        assert all(torch.equal(again["weights"][name], value) for name, value in whole["weights"].items())
