"""ModelSummary: the table."""

from __future__ import annotations

import pytest
from torch import nn
from torch.optim import SGD

import sheer
from sheer.callbacks.model_summary import model_table
from tests.task import loader, step, trainer


def test_modules_by_depth_with_parameters_trained_and_bytes() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(6, 1000), nn.BatchNorm1d(1000)), nn.Linear(1000, 1))
    net[0].requires_grad_(False)
    assert model_table(net, 1).splitlines() == [
        "module  type        parameters  trained    MB",
        "-" * 45,
        "(all)   Sequential      10,001    1,001  0.05",
        "0       Sequential       9,000        0  0.04",
        "1       Linear           1,001    1,001  0.00",
    ]
    assert len(model_table(net, 0).splitlines()) == 3
    assert "  0.1" in model_table(net, 2)


def test_shared_parameters_count_once() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    net["b"].weight = net["a"].weight
    assert "(all)   ModuleDict          16" in model_table(net, 0)


def test_it_is_printed_at_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Linear(6, 1)
    trainer(callbacks=[sheer.ModelSummary()]).fit(net, step, loader(), optimizer=SGD(net.parameters(), lr=0.01))
    assert model_table(net, 1) in capsys.readouterr().out


def test_a_depth_below_0_is_refused() -> None:
    with pytest.raises(sheer.SettingsError, match="depth"):
        sheer.ModelSummary(-1)
