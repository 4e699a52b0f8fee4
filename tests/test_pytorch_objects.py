"""What PyTorch, or the user, adds works without a change here: things that Sheer's source never names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler

import sheer
from tests.task import assert_same, dataset, model, trainer


class SignDescent(Optimizer):
    """An optimizer of the user's own, with a state of its own."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    state["seen"] = state.get("seen", 0) + 1
                    parameter -= group["lr"] / state["seen"] * parameter.grad.sign()


class Halving(LRScheduler):
    """A scheduler of the user's own."""

    def get_lr(self) -> list[float]:
        return [base * 0.5 ** (self.last_epoch // 5) for base in self.base_lrs]


class EverySecond(Sampler[int]):
    """A sampler of the user's own."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, 100, 2))

    def __len__(self) -> int:
        return 50


class Wide(nn.Module):
    """A loss of the user's own."""

    def forward(self, predicted: Tensor, true: Tensor) -> Tensor:
        return torch.log(torch.cosh(predicted - true)).mean()


def matrices_only(net: nn.Module) -> Optimizer:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(parameter.dim() == 2 and "0" in name)
    return torch.optim.Muon([p for p in net.parameters() if p.requires_grad], lr=0.01)


@pytest.mark.parametrize("make_optimizer", [matrices_only, lambda net: SignDescent(net.parameters(), lr=0.01)])
def test_they_train_as_in_a_hand_written_loop_and_resume(make_optimizer: Callable[[nn.Module], Optimizer]) -> None:
    criterion = Wide()

    def step(net: nn.Module, batch: Any) -> Tensor:
        return criterion(net(batch[0]), batch[1])

    net = model()
    optimizer = make_optimizer(net)
    scheduler = Halving(optimizer)
    torch.manual_seed(0)
    for _ in range(3):
        for batch in DataLoader(dataset(), batch_size=10, sampler=EverySecond()):
            step(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    for stop in (15, 7):  # the second is stopped in the middle, and goes on
        for steps in dict.fromkeys((stop, 15)):
            torch.manual_seed(0)
            other = model()
            own = make_optimizer(other)
            torch.manual_seed(0)
            trainer(max_steps=steps, run_dir=f"run{stop}", resume="auto", checkpoint=True).fit(
                other,
                step,
                DataLoader(dataset(), batch_size=10, sampler=EverySecond()),
                optimizer=own,
                scheduler=Halving(own),
            )
        assert_same(other.state_dict(), net.state_dict())


def test_sheers_source_does_not_name_them() -> None:
    source = "".join(path.read_text() for path in Path(sheer.__file__).parent.rglob("*.py"))
    assert not [name for name in ("Muon", "SignDescent", "Halving", "EverySecond", "Wide") if name in source]
