"""Kills a script of a task in the middle of an epoch, starts it again, and compares the end with that of a run that was not killed.

python docs/tasks/try_resume.py digits/with_pytorch.py 30
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
COUNTED = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

left = [int(sys.argv[2])]
def count(optimizer, args, kwargs):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), int(sys.argv[3]))
register_optimizer_step_post_hook(count)
sys.path.insert(0, os.path.dirname(sys.argv[1]))
runpy.run_path(sys.argv[1], run_name="__main__")
print("updates", int(sys.argv[2]) - left[0])
"""


def run(script: str, folder: str, kill_at: int, signal: int = 9) -> str:
    command = [sys.executable, "-c", COUNTED, str(HERE / script), str(kill_at), str(signal)]
    environment = {"TASK_EPOCHS": "3", **os.environ}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if not kill_at:
        assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return f"exit {done.returncode}; " + "; ".join(lines[-2:])[-160:]


def weights(folder: str) -> str:
    """Return a hash of the last checkpoint's weights, whoever wrote it."""
    newest = max(
        (
            path
            for path in Path(folder).rglob("*")
            if path.name in ("last.pt", "last.ckpt", "model.safetensors")
        ),
        key=lambda path: (path.name != "model.safetensors", path.stat().st_mtime),
    )
    if newest.suffix == ".safetensors":
        from safetensors.torch import load_file

        found: Any = load_file(newest)
    else:
        saved = torch.load(newest, weights_only=False)
        found = saved.get("state_dict") or saved.get("model") or saved.get("gan")
    return hashlib.sha256(
        b"".join(found[name].cpu().numpy().tobytes() for name in sorted(found))
    ).hexdigest()[:12]


if __name__ == "__main__":
    script, kill_at = sys.argv[1], int(sys.argv[2])
    signal = int(sys.argv[3]) if len(sys.argv) > 3 else 9
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
        print("whole:  ", run(script, whole, 0), weights(whole))
        print("killed: ", run(script, parts, kill_at, signal))
        print("resumed:", run(script, parts, 0), weights(parts))
        print("equal" if weights(whole) == weights(parts) else "not equal")
