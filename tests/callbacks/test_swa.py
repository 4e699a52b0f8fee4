"""SWA against torch's AveragedModel, update_bn and a learning rate set by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn, update_bn

import sheer
from tests.task import assert_same, dataset, loader, loss_step, model, plain_loader, step, trainer
from tests.test_resume import assert_resumes_exactly


def by_hand(start: int, every: int, lr: float | None = None, anneal: int = 0) -> tuple[nn.Module, AveragedModel]:
    net = model()
    optimizer = SGD(net.parameters(), lr=0.02)
    scheduler = StepLR(optimizer, 1, gamma=0.99)
    average = AveragedModel(net, multi_avg_fn=get_swa_multi_avg_fn())
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    number, before = 0, 0.0
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            number += 1
            if lr is not None and number > start:
                before = before or optimizer.param_groups[0]["lr"]
                part = min(1.0, (number - start) / anneal) if anneal else 1.0
                rate = before + (lr - before) * (1 - math.cos(math.pi * part)) / 2 if part < 1.0 else lr
                optimizer.param_groups[0]["lr"] = rate
            loss_step(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if number > start and (number - start) % every == 0:
                average.update_parameters(net)
    return net, average


def fitted(swa: sheer.SWA, *more: Any, **settings: Any) -> nn.Module:
    net, held = model(), list(loader(32, shuffle=False))
    torch.manual_seed(0)
    trainer(callbacks=[swa, *more], **settings).fit(
        net,
        step,
        loader(),
        held,
        optimizer=SGD(net.parameters(), lr=0.02),
        scheduler=lambda optimizer, total: StepLR(optimizer, 1, gamma=0.99),
    )
    return net


@pytest.mark.parametrize(
    ("arguments", "start", "every"),
    [
        ({"start_step": 4, "every_n_steps": 3}, 4, 3),
        ({"start_epoch": 1}, 7, 7),
        ({"start_step": 0, "every_n_steps": 1, "lr": 0.03}, 0, 1),
        ({"start_step": 5, "every_n_steps": 2, "lr": 0.03, "anneal_steps": 6}, 5, 2),
    ],
)
def test_equals_averaged_model(arguments: dict[str, Any], start: int, every: int) -> None:
    net, average = by_hand(start, every, arguments.get("lr"), arguments.get("anneal_steps", 0))
    swa = sheer.SWA(**arguments, bn_loader=False)
    assert_same(fitted(swa).state_dict(), net.state_dict())
    assert_same(swa.averages() or {}, dict(average.module.named_parameters()))


def test_statistics_of_batch_norms_are_those_of_the_averages_in_evaluations_and_checkpoints() -> None:
    net, average = by_hand(7, 7)
    update_bn(loader(25, shuffle=False), average)
    seen: list[dict[str, Any]] = []

    class Look:
        def on_evaluation_start(self, model: nn.Module) -> None:
            seen.append({name: value.clone() for name, value in model.state_dict().items()})

    swa = sheer.SWA(start_epoch=1, bn_loader=loader(25, shuffle=False))
    assert_same(fitted(swa, Look(), checkpoint=True, run_dir="run").state_dict(), net.state_dict())
    assert_same(seen[-1], average.module.state_dict())
    assert_same(load_file("run/checkpoints/last/model.safetensors"), average.module.state_dict())
    assert_same(load_file("run/checkpoints/last/training.safetensors"), net.state_dict())


def test_the_pass_for_the_statistics_can_be_a_function_and_leaves_modes_alone() -> None:
    x, _ = dataset().tensors
    calls = []

    def forward(net: nn.Module, batch: Any) -> None:
        calls.append(net.training)
        net(batch["x"])

    class HandSet:
        def on_fit_start(self, model: Any, optimizers: Any, info: Any) -> None:
            model[3].eval()

    swa = sheer.SWA(start_step=0, every_n_steps=7, bn_loader=[{"x": x}], bn_forward=forward)
    net = fitted(swa, HandSet())
    assert calls == [True] * 3 and net.training and not net[3].training  # type: ignore[index]


@pytest.mark.parametrize("stop", [3, 9, 11, 14, 19])
def test_resumes_exactly(stop: int) -> None:
    """Also with a pass that draws random numbers, made at other times in the run that was stopped."""

    def callbacks() -> list[Any]:
        swa = sheer.SWA(start_step=5, every_n_steps=4, lr=0.02, anneal_steps=10, bn_loader=loader(20))
        return [swa, sheer.LearningRateMonitor()]

    assert_resumes_exactly(
        stop, make_callbacks=callbacks, make_scheduler=lambda optimizer: StepLR(optimizer, 1, gamma=0.9)
    )
    files = [f"{folder}/checkpoints/last/model.safetensors" for folder in ("whole", "stopped")]
    assert_same(load_file(files[0]), load_file(files[1]))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(sheer.SettingsError, match="one of start_step and start_epoch"):
        sheer.SWA()
    with pytest.raises(sheer.SettingsError, match="Give bn_loader"):
        fitted(sheer.SWA(start_epoch=1))
    with pytest.raises(sheer.SettingsError, match="Give start_step and every_n_steps"):
        net = nn.Linear(6, 1)
        trainer(callbacks=[sheer.SWA(start_epoch=1)], max_steps=3, max_epochs=None).fit(
            net, step, iter(list(loader())), optimizer=SGD(net.parameters(), lr=0.1)
        )


def test_an_averaging_that_never_begins_is_said_at_the_start() -> None:
    with pytest.warns(sheer.SheerWarning, match="SWA will average nothing: its first average is that of step 42"):
        fitted(sheer.SWA(start_epoch=5, bn_loader=False))
