"""Every example runs, on what is really there, and does what it says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}  # two threads wait for each other on small work


def run(example: str, *settings: str) -> str:
    command = [sys.executable, "-m", "sheer", "run"]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / example)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def number_after(words: str, output: str) -> float:
    match = re.search(re.escape(words) + r"\s*([\d.]+)", output)
    assert match is not None, output
    return float(match[1])


def test_digits_are_learnt_and_then_served_without_sheer() -> None:
    output = run("digits.py")
    assert number_after("'test/accuracy':", output) > 0.9
    served = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "serve.py")], capture_output=True, text=True, timeout=120
    )
    assert "guessed: [0, 1, 2, 3, 4" in served.stdout, served.stderr


def test_the_gan_hits_all_points() -> None:
    assert number_after("after 2000 steps", run("gan.py")) >= 7


def test_the_policy_balances_the_pole() -> None:
    assert number_after("the poles stand for", run("reinforcement.py")) > 150


def test_the_lstm_tells_the_waves_apart() -> None:
    assert number_after("mean recall over the kinds:", run("lstm.py")) > 0.9


def test_the_language_model_is_fine_tuned_and_saved_by_its_own_library() -> None:
    run("finetune_transformers.py", "max_epochs=1")
    assert Path("runs/finetune/adapter/adapter_model.safetensors").exists()


def test_the_demo_is_stopped_by_ctrl_c_and_goes_on_by_the_same_command() -> None:
    command = [sys.executable, "-m", "sheer", "run", "--set", "max_steps=60", "--set", "validate_every_n_steps=30"]
    command.append(str(ROOT / "examples" / "gpt.py"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 20/60"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 85, rest
    stopped = json.loads(Path("runs/gpt/checkpoints/last/manifest.json").read_text())["step"]
    assert 20 <= stopped < 60

    output = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert output.returncode == 0, output.stderr
    assert f"at step {stopped}" in output.stdout
    assert number_after("validation loss", output.stdout) < number_after("unigram model", output.stdout)
    steps = [json.loads(line)["step"] for line in Path("runs/gpt/metrics.jsonl").read_text().splitlines()]
    assert steps == [20, 30, 40, 60, 60]
    assert Path("runs/gpt/curves.png").stat().st_size > 10_000
