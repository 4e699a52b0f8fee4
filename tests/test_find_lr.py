"""The learning rate finder against a sweep written by hand; and nothing is left changed."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import sheer
from tests.task import assert_same, loader, loss_step, model, plain_loader, step
from tests.test_resume import assert_equal


def test_losses_are_those_of_a_sweep_written_by_hand() -> None:
    net = model()
    optimizer = AdamW(net.parameters(), lr=1.0)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    losses: list[float] = []
    rates = [1e-4 * (1e3) ** (number / 19) for number in range(20)]
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            if len(losses) == 20:
                break
            optimizer.param_groups[0]["lr"] = rates[len(losses)]
            loss = loss_step(net, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

    other = model()
    settings = sheer.Settings(gradient_clip_val=1.0)
    torch.manual_seed(0)
    finding = sheer.find_lr(
        other, step, loader(), AdamW(other.parameters(), lr=1.0), min_lr=1e-4, max_lr=0.1, steps=20, settings=settings
    )
    assert finding.losses == losses
    assert finding.lrs == pytest.approx(rates)


def test_model_optimizer_and_random_states_are_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    net = model()
    net[1].eval()
    groups: list[dict[str, Any]] = [{"params": net[:2].parameters()}, {"params": net[4].parameters(), "lr": 0.1}]
    optimizer = AdamW(groups, lr=1e-2)
    loss_step(net, next(iter(loader()))).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict())), torch.get_rng_state()
    sheer.find_lr(net, step, loader(), optimizer, steps=10, max_lr=0.1)
    assert_same(net.state_dict(), before[0][0])
    assert_equal(optimizer.state_dict(), before[0][1])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert net.training and not net[1].training
    assert list(tmp_path.glob("dev-run-*")) == [] and not Path("runs").exists()


def test_a_diverging_loss_ends_the_sweep_and_the_suggestion_is_before_the_lowest() -> None:
    net = nn.Linear(6, 1)
    finding = sheer.find_lr(net, loss_step, loader(), SGD(net.parameters(), lr=0.1), min_lr=1e-4, max_lr=1e3, steps=100)
    assert len(finding.losses) == len(finding.lrs) < 100
    assert finding.suggestion is not None and 1e-3 < finding.suggestion < 1.0


def test_groups_keep_their_ratios_and_the_optimizer_can_be_a_function() -> None:
    net = nn.Linear(6, 1)
    seen: list[float] = []

    class Seen(SGD):
        def step(self, closure: Any = None) -> None:
            seen.append(self.param_groups[1]["lr"] / self.param_groups[0]["lr"])

    sheer.find_lr(
        net,
        loss_step,
        loader(),
        lambda net: Seen([{"params": [net.weight]}, {"params": [net.bias], "lr": 0.5}], lr=0.1),
        steps=5,
    )
    assert seen == pytest.approx([5.0] * 5)


def test_a_rate_that_is_a_tensor_stays_one() -> None:
    net = nn.Linear(6, 1)
    optimizer = AdamW(net.parameters(), lr=torch.tensor(0.5))
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    sheer.find_lr(net, loss_step, loader(), optimizer, min_lr=0.001, max_lr=0.01, steps=5)
    assert all(rate is seen[0] for rate in seen) and seen[0].item() == pytest.approx(0.01)
    assert optimizer.param_groups[0]["lr"].item() == 0.5


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    net = nn.Linear(6, 1)
    finding = sheer.find_lr(
        net,
        lambda net, batch: (net.weight.sum() + net.bias.sum()) * 0 + 1,
        loader(),
        SGD(net.parameters(), lr=0.1),
        steps=8,
    )
    assert finding.suggestion is None


def test_the_picture_and_the_errors(tmp_path: Path) -> None:
    finding = sheer.LRFinding([1e-3, 1e-2, 1e-1], [3.0, 2.0, math.inf], 1e-2)
    assert finding.plot(tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    net = nn.Linear(6, 1)
    with pytest.raises(sheer.SettingsError, match="min_lr must be above 0 and below max_lr"):
        sheer.find_lr(net, step, loader(), SGD(net.parameters()), min_lr=1.0, max_lr=0.1)


def test_an_error_of_the_step_comes_through_and_all_is_as_it_was() -> None:
    def bad(net: nn.Module, batch: Any) -> Tensor:
        net(batch[0])
        raise ValueError("in the step")

    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="in the step"):
        sheer.find_lr(net, bad, loader(), SGD(net.parameters(), lr=0.1))
    assert_same(net.state_dict(), before)


def test_what_the_trainer_validates_is_no_matter() -> None:
    net = model()
    settings = sheer.Settings(max_epochs=1, device="cpu", validate_every_n_steps=5, validate_first=True)
    assert len(sheer.find_lr(net, step, loader(), SGD(net.parameters(), lr=0.1), steps=5, settings=settings).lrs) == 5
