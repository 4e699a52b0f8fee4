"""Freeze against requires_grad set by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import sheer
from tests.task import assert_same, loader, loss_step, model, plain_loader, step, trainer
from tests.test_resume import assert_resumes_exactly


def by_hand(steps: int) -> nn.Module:
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    net[:2].requires_grad_(False)
    net[1].eval()
    number = 0
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            if number == steps:
                net[:2].requires_grad_(True)
                net[1].train()
            loss_step(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            number += 1
    return net


def fitted(*callbacks: Any) -> nn.Module:
    net, held = model(), list(loader(32, shuffle=False))
    optimizer = AdamW(net.parameters(), lr=1e-2)
    torch.manual_seed(0)
    trainer(callbacks=callbacks).fit(net, step, loader(), held, optimizer=optimizer)
    return net


@pytest.mark.parametrize(
    ("arguments", "steps"), [({}, 100), ({"until_step": 4}, 4), ({"until_epoch": 1}, 7), ({"until_step": 0}, 0)]
)
def test_frozen_until_a_step_or_an_epoch(arguments: dict[str, Any], steps: int) -> None:
    assert_same(fitted(sheer.Freeze(["0", "1"], **arguments)).state_dict(), by_hand(steps).state_dict())


def test_patterns_name_modules_with_all_in_them_and_parameters() -> None:
    net = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), "head": nn.Linear(6, 1)})

    def loss(net: Any, batch: Any) -> Any:
        return loss_step(nn.Sequential(net["encoder"], net["head"]), batch)

    def frozen(patterns: Any) -> list[str]:
        names: list[str] = []

        def look(step: int, model: nn.Module) -> None:
            names.extend(name for name, p in model.named_parameters() if not p.requires_grad)

        trainer(callbacks=[sheer.Freeze(patterns), sheer.On(update=look)], max_steps=1, max_epochs=None).fit(
            net, loss, loader(), optimizer=AdamW(net.parameters())
        )
        assert all(p.requires_grad for p in net.parameters())
        return names

    assert frozen("encoder") == ["encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias"]
    assert frozen("encoder.[1-9]") == ["encoder.1.weight", "encoder.1.bias"]
    assert frozen(["*.bias"]) == ["encoder.0.bias", "encoder.1.bias", "head.bias"]


def test_batch_norms_can_go_on_with_their_statistics() -> None:
    net = fitted(sheer.Freeze("1", batch_norm_eval=False))
    assert net[1].training and net[1].num_batches_tracked.item() == 21  # type: ignore[index]


def test_part_by_part() -> None:
    net = model()
    seen: list[tuple[int, list[bool]]] = []

    def look(step: int, model: nn.Module) -> None:
        seen.append((step, [all(p.requires_grad for p in model[i].parameters()) for i in (0, 4)]))  # type: ignore[index]

    callbacks = [
        sheer.Freeze("0", until_step=4),
        sheer.Freeze("4", until_step=2),
        sheer.On(update=look, every_n_steps=2),
    ]
    trainer(callbacks=callbacks, max_epochs=1).fit(net, step, loader(), optimizer=AdamW(net.parameters()))
    assert seen == [(2, [False, False]), (4, [False, True]), (6, [True, True])]


@pytest.mark.parametrize("stop", [2, 4, 5, 7, 9])
@pytest.mark.parametrize("arguments", [{"until_step": 4}, {"until_epoch": 1}])
def test_resumes_exactly(arguments: dict[str, Any], stop: int) -> None:
    assert_resumes_exactly(stop, make_callbacks=lambda: [sheer.Freeze(["0", "1"], **arguments)])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(sheer.SettingsError, match="one of the two"):
        sheer.Freeze("0", until_step=1, until_epoch=1)
    with pytest.raises(sheer.ModelError, match=r"'encoder'\) fits no module .* 0, 1, 2, 3, 4"):
        fitted(sheer.Freeze("encoder"))
