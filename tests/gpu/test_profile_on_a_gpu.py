"""`sheer profile` of a script that trains on a GPU: run by hand with `pytest -m gpu`; `-s` shows what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.profiling.test_profile import profiled

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SCRIPT = """
import torch, sheer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

def step(net, batch):
    x, y = batch
    loss = nn.functional.cross_entropy(net(x), y)
    if loss.item() > 100:
        raise ValueError("diverged")
    return loss

samples = TensorDataset(torch.randn(3200, 16), torch.randint(4, (3200,)))
sheer.Trainer(max_steps=100, device="cuda", log_every_n_steps=10, checkpoint=sheer.Checkpoint(every_n_steps=5)CAPTURED).fit(
    net, step, DataLoader(samples, 32), optimizer=torch.optim.AdamW(net.parameters())
)
"""


def idle(output: str) -> float:
    found = re.search(r"^device idle \(host-bound gaps\) +[0-9.]+ +([0-9.]+)%", output, re.MULTILINE)
    assert found is not None, output
    return float(found[1])


def test_gaps_are_told_and_a_wait_is_named_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, output = profiled(SCRIPT.replace("CAPTURED", ""))
    print(output)
    assert status == 0, output
    assert "train.py:11 waits for the device 1x a step" in output and "`if loss.item() > 100:`" in output
    assert idle(output) > 50  # a small model, whose device waits for Python
    assert "cuda_graph=True" in output
    (folder,) = Path("runs/profile").iterdir()
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert {"forward", "backward", "optimizer"} <= {event["name"] for event in events}


def test_replays_have_a_row_of_their_own() -> None:
    script = SCRIPT.replace("CAPTURED", ", cuda_graph=True").replace(
        'if loss.item() > 100:\n        raise ValueError("diverged")', "pass"
    )
    fused = script.replace("AdamW(net.parameters())", "AdamW(net.parameters(), fused=True)")
    status, output = profiled(fused, "--warmup", "6")
    print(output)
    assert status == 0, output
    assert re.search(r"^replaying the graph +[0-9.]+ +[0-9.]+%", output, re.MULTILINE), output
    assert not re.search(r"^(forward|backward|optimizer) ", output, re.MULTILINE)
