"""LearningRateMonitor: names and values."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR

import sheer
from tests.task import loader, loss_step, model, step, trainer


def logged(monitor: sheer.LearningRateMonitor, make_optimizer: Any, make_scheduler: Any = None) -> list[dict[str, Any]]:
    trainer(callbacks=[monitor], max_epochs=1, log_every_n_steps=3, run_dir="run").fit(
        model(), step, loader(), optimizer=make_optimizer, scheduler=make_scheduler
    )
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def test_one_group_is_lr_as_the_scheduler_left_it() -> None:
    lines = logged(
        sheer.LearningRateMonitor(),
        lambda net: SGD(net.parameters(), lr=0.08),
        lambda optimizer, total: StepLR(optimizer, 3, gamma=0.5),
    )
    assert [(line["step"], line["lr"]) for line in lines] == [(3, 0.04), (6, 0.02), (7, 0.02)]


def test_groups_by_name_or_number_with_momentum_and_weight_decay() -> None:
    def groups(net: Any) -> AdamW:
        rest = [p for module in net[1:] for p in module.parameters()]
        return AdamW([{"params": net[0].parameters(), "name": "first"}, {"params": rest, "lr": 0.1}], lr=0.2)

    line = logged(sheer.LearningRateMonitor(momentum=True, weight_decay=True), groups)[0]
    assert line["lr/first"] == 0.2 and line["lr/1"] == 0.1
    assert line["momentum/first"] == 0.9 and line["weight_decay/1"] == 0.01


def loss_of_part(name: str, net: nn.Module, batch: Any) -> Any:
    return loss_step(net[name], batch)


def test_optimizers_by_name() -> None:
    net = nn.ModuleDict({"d": nn.Linear(6, 1), "g": nn.Linear(6, 1)})
    optimizers = {name: SGD(net[name].parameters(), lr=rate) for name, rate in (("d", 0.1), ("g", 0.2))}
    monitor = sheer.LearningRateMonitor()
    with trainer(callbacks=[monitor], max_steps=1, max_epochs=None).start(net, optimizers=optimizers) as run:
        for batch in run.steps(loader()):
            for name, optimizer in optimizers.items():
                run.update(optimizer, functools.partial(loss_of_part, name), batch)
    assert monitor.on_log(1, {}) == {"lr/d": 0.1, "lr/g": 0.2}
