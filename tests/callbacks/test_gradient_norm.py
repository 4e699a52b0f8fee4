"""GradientNorm: the norm before clipping, at log points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import sheer
from tests.task import loader, loss_step, model, plain_loader, trainer


def test_equals_clip_grad_norms_return_value_at_log_points() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=0.01)
    torch.manual_seed(0)
    expected, parts = [], []
    batches, _ = plain_loader()
    for number, batch in enumerate(batches, start=1):
        loss_step(net, batch).backward()
        part = net[4].weight.grad.norm().item()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1).item()
        optimizer.step()
        optimizer.zero_grad()
        if number % 3 == 0:
            expected.append(norm)
            parts.append(part)

    other = model()
    torch.manual_seed(0)
    trainer(
        callbacks=[sheer.GradientNorm(per_parameter=True)],
        max_epochs=1,
        log_every_n_steps=3,
        gradient_clip_val=0.1,
        run_dir="run",
    ).fit(other, loss_step, loader(), optimizer=SGD(other.parameters(), lr=0.01))
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["train/gradient_norm"] for line in lines if "train/gradient_norm" in line] == expected
    assert [line["train/gradient_norm/4.weight"] for line in lines[:2]] == parts


def test_nothing_is_computed_at_other_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    from sheer.callbacks import gradient_norm

    def counted(gradients: Any, ranks: None, norm_type: float) -> Any:
        calls.append(len(gradients))
        return torch.tensor(0.0)

    monkeypatch.setattr(gradient_norm, "global_norm", counted)
    net = model()
    trainer(callbacks=[sheer.GradientNorm()], max_epochs=1, log_every_n_steps=3).fit(
        net, loss_step, loader(), optimizer=SGD(net.parameters(), lr=0.01)
    )
    assert calls == [6, 6]


def test_several_updates_a_step_are_numbered() -> None:
    net = nn.ModuleDict({"d": nn.Linear(6, 1), "g": nn.Linear(6, 1)})
    optimizers = {name: SGD(net[name].parameters(), lr=0.1) for name in net}
    norm = sheer.GradientNorm()
    with trainer(callbacks=[norm], max_steps=1, max_epochs=None, log_every_n_steps=1).start(
        net, optimizers=optimizers
    ) as run:
        for batch in run.steps(loader()):
            run.update(optimizers["d"], lambda net, batch: loss_step(net["d"], batch), batch)
            run.update(optimizers["g"], lambda net, batch: loss_step(net["g"], batch), batch)
    assert list(norm.on_log(1, {}) or {}) == ["train/gradient_norm/1", "train/gradient_norm/2"]
