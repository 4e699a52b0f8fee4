"""`sheer run` in a process of its own, on a script that is written to train.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    Path("train.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "sheer", "run", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(script: str, *arguments: str) -> tuple[int, str, str]:
    process = start(script, *arguments)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err
