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


def run(example: str, *settings: str, ranks: int = 1, arguments: tuple[str, ...] = ()) -> str:
    command = [sys.executable, "-m", "sheer", "run"]
    for setting in settings:
        command += ["--set", setting]
    if ranks > 1:
        command += ["--nproc-per-node", str(ranks)]
    command += [str(ROOT / "examples" / example), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
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


def test_the_demo_ends_with_the_same_loss_however_ranks_share_the_work() -> None:
    losses = set()
    for ranks, way in ((2, "ddp"), (2, "fsdp"), (4, "tp2")):
        output = run(
            "gpt_on_ranks.py", "max_steps=6", "validate_every_n_steps=6", ranks=ranks, arguments=("--parallel", way)
        )
        losses.add(number_after(f"{way} on {ranks} ranks: validation loss", output))
    assert len(losses) == 1, losses


def test_shards_are_made_once_and_pretrained_on_by_ranks_that_share_the_model() -> None:
    output = run("pretrain_shards.py", "max_steps=10", ranks=2)
    assert "ranks: 2 (dp_shard=2)" in output
    assert number_after("validation loss", output) < 5.5  # bytes that are all alike likely: log 256
    shards = {path.name: path.stat().st_mtime_ns for path in Path("runs/shards").iterdir()}
    assert len(shards) > 2

    assert "at step 10" in run("pretrain_shards.py", "max_steps=12", ranks=2)
    assert shards == {path.name: path.stat().st_mtime_ns for path in Path("runs/shards").iterdir()}


def test_packed_documents_are_pretrained_on() -> None:
    output = run("pretrain_packed.py", "max_steps=12")
    assert number_after("rows of 256,", output) > 99
    assert number_after("validation loss", output) < 5  # bytes that are all alike likely: 5.5


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
