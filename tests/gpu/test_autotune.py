"""autotune on a GPU: it finds that a small model wants a graph, and what it chooses trains as it said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

import sheer
from sheer.scripts import Call
from sheer.speed.autotune import find_way
from tests.gpu.test_graph import Net, data, step
from tests.task import assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_small_model_is_captured_and_everything_is_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = Net().cuda()
    optimizer = AdamW(net.parameters(), lr=1e-3)
    trainer = sheer.Trainer(max_epochs=3, device="cuda")
    before = copy.deepcopy(net.state_dict())
    drawn = torch.cuda.get_rng_state()
    loader = DataLoader(data(96), 16, shuffle=True)
    said: list[str] = []
    way = find_way(Call(trainer.settings, trainer.plugins, net, step, loader, optimizer), said.append)
    with capsys.disabled():
        print("\n" + "\n".join(said))
    assert way.cuda_graph
    text = "\n".join(said)
    for tried in ("compile=True", "cuda_graph=True", "fused=True", "'tf32-true'", "'bf16-mixed'"):
        assert tried in text
    assert text.count(" yes ") > 3 and torch.get_float32_matmul_precision() == "highest"
    assert_same(net.state_dict(), before)
    assert torch.equal(torch.cuda.get_rng_state(), drawn)
    assert (
        not optimizer.state and not optimizer.param_groups[0]["fused"] and not optimizer.param_groups[0]["capturable"]
    )
    assert len(optimizer._optimizer_step_pre_hooks) == 0


def test_a_run_that_is_tuned_and_goes_on_as_it_was_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = Net()
    how: dict[str, Any] = {"device": "cuda", "run_dir": str(tmp_path / "run"), "autotune": True, "resume": "auto"}
    for epochs in (2, 4):
        sheer.Trainer(max_epochs=epochs, **how).fit(
            net, step, DataLoader(data(96), 16, shuffle=True), optimizer=lambda net: AdamW(net.parameters(), lr=1e-3)
        )
    way = json.loads((tmp_path / "run" / "autotune.json").read_text())
    assert way["cuda_graph"] and capsys.readouterr().out.count("autotune: as when the run began:") == 1


class Looks:
    def on_gradients(self, step: int, net: nn.Module) -> None:
        pass


def test_a_callback_that_looks_at_gradients_rules_out_a_graph() -> None:
    net = Net()
    trainer = sheer.Trainer(max_epochs=3, device="cuda", compile=True, callbacks=[Looks()])
    loader, optimizer = DataLoader(data(96), 16), AdamW(net.parameters(), fused=True)
    call = Call(trainer.settings, trainer.plugins, net, step, loader, optimizer)
    assert not find_way(call, lambda line: None).cuda_graph
