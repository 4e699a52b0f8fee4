"""Mistakes in one's own loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import sheer
from sheer import DataError, ModelError, SettingsError, StepError
from tests.task import loader, loss_step, model, step


def started(net: nn.Module, optimizers: Any, **how: Any) -> sheer.Loop:
    schedulers = how.pop("schedulers", None)
    return sheer.Trainer(max_steps=3, checkpoint=False, **how).start(net, optimizers=optimizers, schedulers=schedulers)


def sgd(net: nn.Module) -> SGD:
    return SGD(net.parameters(), lr=0.1)


def test_optimizers_without_names() -> None:
    net = model()
    for given in ([sgd(net)], sgd(net), {}):
        with pytest.raises(SettingsError, match="optimizers must name each optimizer, as"):
            started(net, given)


def test_schedulers_without_names() -> None:
    net = model()
    optimizer = sgd(net)
    with pytest.raises(SettingsError, match="schedulers must name each by its optimizer, as"):
        started(net, {"sgd": optimizer}, schedulers=StepLR(optimizer, 1))


def test_a_scheduler_of_an_optimizer_that_is_not_there() -> None:
    net = model()
    with pytest.raises(SettingsError, match="which schedulers refers to, has no 'sdg'"):
        started(net, {"sgd": sgd(net)}, schedulers={"sdg": None})


def test_an_update_with_an_optimizer_that_the_run_does_not_know() -> None:
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with (
        pytest.raises(SettingsError, match="not one of those the run was started with: sgd"),
        started(net, {"sgd": sgd(net)}) as run,
    ):
        for batch in run.steps(loader()):
            run.update(sgd(net), step, batch)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_parameters_that_none_of_several_optimizers_has() -> None:
    net: Any = model()
    with pytest.raises(ModelError, match=r"No optimizer holds 1\.weight, 1\.bias"):
        started(net, {"a": sgd(net[0]), "b": sgd(net[4])})


def test_a_step_without_a_loss() -> None:
    net = model()
    optimizer = sgd(net)
    with pytest.raises(StepError, match="returned None"), started(net, {"sgd": optimizer}) as run:
        for batch in run.steps(loader()):
            run.update(optimizer, lambda net, batch: None, batch)


def test_a_step_bound_to_the_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 1)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.inner(batch[0]).mean()

    net = Net()
    optimizer = sgd(net)
    with pytest.raises(StepError, match="Pass it unbound"), started(net, {"sgd": optimizer}) as run:
        for batch in run.steps(loader()):
            run.update(optimizer, net.training_step, batch)


def test_an_empty_loader() -> None:
    net = model()
    with pytest.raises(DataError, match="The training loader is empty"), started(net, {"sgd": sgd(net)}) as run:
        for _ in run.steps([]):
            pass


def test_no_duration() -> None:
    net = model()
    with pytest.raises(SettingsError, match="Give max_steps, max_epochs or max_time"):
        sheer.Trainer().start(net, optimizers={"sgd": sgd(net)})


def test_a_plateau_schedule_without_a_monitored_metric() -> None:
    net = model()
    optimizer = sgd(net)
    with pytest.raises(SettingsError, match="ReduceLROnPlateau follows the monitored metric"):
        started(net, {"sgd": optimizer}, schedulers={"sgd": ReduceLROnPlateau(optimizer)})


def test_a_monitored_metric_that_the_evaluation_does_not_return() -> None:
    net = model()
    optimizer = sgd(net)
    with (
        pytest.raises(SettingsError, match=r"monitor='val/eror' is no metric.* Did you mean 'val/error'\?"),
        started(net, {"sgd": optimizer}, monitor="val/eror") as run,
    ):
        for batch in run.steps(loader()):
            run.update(optimizer, loss_step, batch)
            run.evaluate(step, loader(32, shuffle=False))
    assert run.step == 1
