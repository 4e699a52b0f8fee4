"""Mistakes in the step function: before step 1 where its signature tells, else in step 1, before the update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sheer
from sheer import StepError
from tests.mistakes.common import fit, refused
from tests.task import loader, loss_step, model, step

Net = nn.Module


def test_a_mapping_without_a_loss() -> None:
    refused(
        StepError, 'returned a mapping without "loss"; it has [\'mse\']', "scalar tensor",
        step=lambda net, batch: {"mse": loss_step(net, batch)},
    )  # fmt: skip


def test_a_loss_that_is_no_scalar() -> None:
    refused(
        StepError, "a loss of shape [16, 1]", "Reduce it with .mean()",
        step=lambda net, batch: (net(batch[0]) - batch[1]) ** 2,
    )  # fmt: skip


def detached(net: Net, batch: Any) -> Tensor:
    return loss_step(net, batch).detach()


@torch.no_grad()
def under_no_grad(net: Net, batch: Any) -> Tensor:
    return loss_step(net, batch)


def of_labels_alone(net: Net, batch: Any) -> Tensor:
    return batch[1].mean()


@pytest.mark.parametrize("step", [detached, under_no_grad, of_labels_alone])
def test_a_loss_without_a_gradient(step: Any) -> None:
    refused(StepError, step.__name__, "a loss without a gradient", "detached, computed under no_grad", step=step)


def test_a_loss_read_with_item() -> None:
    refused(
        StepError, "returned a float as its loss", "do not call .item()",
        step=lambda net, batch: {"loss": loss_step(net, batch).item()},
    )  # fmt: skip


def test_a_step_that_returns_nothing() -> None:
    def forgets(net: Net, batch: Any) -> None:
        loss_step(net, batch)

    refused(StepError, "forgets returned None; is there a `return` missing?", step=forgets)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_loss_and_something_else_in_a(kind: type) -> None:
    message = refused(
        StepError, f"returned a {kind.__name__} of 2", "Which of them is the loss cannot be known", "sheer.Mean",
        step=lambda net, batch: kind([loss_step(net, batch), 3]),
    )  # fmt: skip
    assert '"loss"' in message


def test_a_metric_that_is_a_tuple() -> None:
    refused(
        StepError, "'accuracy' as a tuple", "sheer.Mean(total, count)",
        step=lambda net, batch: {"loss": loss_step(net, batch), "accuracy": (3, 16)},
    )  # fmt: skip


def test_a_metric_that_is_no_scalar() -> None:
    refused(
        StepError, "'prediction' with shape [16, 1]", "a metric is one number", "sheer.mean(values, mask)",
        step=lambda net, batch: {"loss": loss_step(net, batch), "prediction": net(batch[0])},
    )  # fmt: skip


def test_a_metric_that_is_text() -> None:
    refused(
        StepError, "'what' as a str", "sheer.Text",
        step=lambda net, batch: {"loss": loss_step(net, batch), "what": "a word"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (lambda batch: batch, "(batch)"),
        (lambda net, batch, index: net, "(net, batch, index)"),
        (lambda: None, "()"),
    ],
)
def test_a_step_with_other_arguments(step: Any, shape: str) -> None:
    refused(StepError, "is called with (model, batch)", f"{shape} takes other arguments", step=step)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 1)

    def training_step(self, batch: Any) -> Tensor:
        return F.mse_loss(self.inner(batch[0]), batch[1])

    def training_step_with_index(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.inner(batch[0]), batch[1])


def test_a_bound_method_where_an_unbound_one_is_meant() -> None:
    net = Module()
    for bound in (net.training_step, net.training_step_with_index):
        refused(StepError, "its `self` is taken", f"Pass it unbound, as Module.{bound.__name__}", net=net, step=bound)


def test_the_model_in_place_of_the_step() -> None:
    net = model()
    refused(StepError, "a Sequential was given", "def step(model, batch)", net=net, step=net)


def test_what_is_no_function_in_place_of_the_step() -> None:
    refused(StepError, "step must be a function of (model, batch), not 'mse'", step="mse")


def test_a_wrong_eval_step_is_found_before_the_training() -> None:
    val = loader(32, shuffle=False)
    refused(StepError, "eval_step is called with (model, batch)", val_loader=val, eval_step=lambda batch: batch)
    refused(
        StepError,
        "The step returned None; is there a `return` missing?",
        val_loader=val,
        eval_step=lambda net, batch: None,
    )
    refused(StepError, "'all' with shape [32, 1]", val_loader=val, eval_step=lambda net, batch: {"all": net(batch[0])})


def test_an_error_in_the_validation_is_raised_before_the_training() -> None:
    def broken(net: Net, batch: Any) -> Any:
        return step(net, batch) if net.training else {"loss": batch[2]}

    with pytest.raises(IndexError) as error:
        fit(broken, val_loader=loader(32, shuffle=False), max_epochs=1)
    evaluated, trial, where = error.value.__notes__
    assert evaluated == "While val was evaluated; its batch: [float32 [32, 6], float32 [32, 1]]."
    assert "This was the trial of the validation" in trial and where == "Before the first step."


def once(values: list[int]) -> Any:
    return next(value for value in values if value > 9)  # raises StopIteration


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stop_iteration_in_the_step_does_not_end_the_epoch(accumulate: int) -> None:
    calls = []

    def step(net: Net, batch: Any) -> Any:
        calls.append(1)
        return loss_step(net, batch) if len(calls) < 3 else once([1])

    with pytest.raises(StopIteration) as error:
        fit(step, accumulate_grad_batches=accumulate)
    assert len(calls) == 3
    assert "came out of your own code: a next() without a default" in error.value.__notes__[0]


def test_a_stop_iteration_in_the_validation_does_not_end_it() -> None:
    with pytest.raises(StopIteration) as error:
        fit(val_loader=loader(32, shuffle=False), eval_step=lambda net, batch: once([1]))
    assert "came out of your own code" in error.value.__notes__[-1]


def test_a_stop_iteration_in_a_test_or_prediction_is_an_error() -> None:
    made = sheer.Trainer(max_steps=1)
    for call in (made.test, made.validate):
        with pytest.raises(StopIteration):
            call(model(), lambda net, batch: once([1]), loader())
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(made.predict(model(), lambda net, batch: once([1]), loader()))


def test_a_stop_iteration_in_an_own_loops_step_is_an_error() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run = sheer.Trainer(max_steps=3).start(net, optimizers={"sgd": optimizer})
    with pytest.raises(StopIteration), run:
        for batch in run.steps(loader()):
            run.update(optimizer, lambda net, batch: once([1]), batch)
    assert run.step == 1


def test_a_mean_in_some_steps_and_a_plain_value_in_others() -> None:
    calls = []

    def changing(net: Net, batch: Any) -> Any:
        calls.append(1)
        loss = loss_step(net, batch)
        return {"loss": loss, "error": sheer.mean(loss) if len(calls) == 1 else loss}

    refused(StepError, "'error' was a Mean in some steps and a plain value in others", step=changing, updates=1)


@pytest.mark.parametrize("total", [lambda values: values, lambda values: values.sum().item()])
def test_a_mean_whose_total_cannot_be_trained_on(total: Callable[[Tensor], Any]) -> None:
    def step(net: Net, batch: Any) -> Any:
        return sheer.Mean(total((net(batch[0]) - batch[1]) ** 2), 16)

    refused(StepError, "a Mean whose total is not a scalar tensor that needs gradients", step=step)


def test_a_partial_function_is_no_mistake() -> None:
    assert fit(functools.partial(lambda scale, net, batch: loss_step(net, batch) * scale, 2.0), max_steps=2).step == 2


def test_a_step_that_uses_another_model() -> None:
    other = model()
    refused(
        StepError, "gave no gradient to any of the optimizer's 6 parameters (0.weight, ...)", "does not use the `model` that it is given",
        step=lambda net, batch: step(other, batch),
    )  # fmt: skip


def test_a_step_that_uses_a_part_of_the_model() -> None:
    def part(net: Any, batch: Any) -> Any:
        return (net[0](batch[0]).mean(1, keepdim=True) - batch[1]).square().mean()

    with pytest.warns(sheer.SheerWarning, match="gave no gradient to 1.weight, 1.bias, 4.weight and 1 more"):
        fit(part)


def test_a_step_that_calls_backward() -> None:
    def eager(net: nn.Module, batch: Any) -> Any:
        loss = step(net, batch)["loss"]
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="second time") as caught:
        fit(eager)
    assert "the step function calls backward itself, most likely" in caught.value.__notes__[0]


def test_a_loss_inside_of_an_object() -> None:
    @dataclasses.dataclass
    class Output:
        loss: Tensor

    refused(
        StepError,
        "returned a Output. Return its loss: output.loss",
        step=lambda net, batch: Output(step(net, batch)["loss"]),
    )
