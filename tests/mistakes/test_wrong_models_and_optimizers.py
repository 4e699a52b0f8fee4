"""Models, optimizers and schedulers that do not fit together: all found before step 1."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

import sheer
from sheer import ModelError, SettingsError
from sheer.nonfinite import Watch
from tests.mistakes.common import fit, linear, refused
from tests.task import loader, loss_step, model


def test_an_optimizer_of_another_model() -> None:
    refused(
        ModelError, "holds none of the model's parameters", "training would change nothing", "Build it from this model's",
        optimizer=AdamW(model().parameters()),
    )  # fmt: skip


def test_an_optimizer_built_before_the_model_was_copied() -> None:
    net = model()
    optimizer = AdamW(net.parameters())
    refused(ModelError, "before the model was copied", net=copy.deepcopy(net), optimizer=optimizer)


def test_an_optimizer_that_also_holds_parameters_outside_the_model() -> None:
    net, head = model(), linear()
    refused(
        ModelError, "holds 2 parameters that the model does not have (shapes [1, 6], [1])",
        "Put them into one nn.Module with the model", net=net, optimizer=AdamW([*net.parameters(), *head.parameters()]),
    )  # fmt: skip


def test_parameters_that_no_optimizer_has() -> None:
    net = model()
    refused(
        ModelError, "No optimizer holds 4.weight, 4.bias", "they would never be trained", "requires_grad_(False)",
        net=net, optimizer=AdamW([*net[0].parameters(), *net[1].parameters()]),  # type: ignore[index]
    )  # fmt: skip


def test_a_layer_that_was_replaced_after_the_optimizer_was_built() -> None:
    net: Any = model()
    optimizer = AdamW(net.parameters())
    net[4] = nn.Linear(16, 1)
    refused(ModelError, "parameters that the model does not have", net=net, optimizer=optimizer)


def test_a_model_with_nothing_to_train() -> None:
    net = model().requires_grad_(False)
    refused(ModelError, "no parameter with requires_grad", net=net, optimizer=AdamW(net.parameters()))


def test_the_class_of_an_optimizer() -> None:
    refused(
        ModelError, "optimizer is the class AdamW", "lambda model: AdamW(model.parameters(), lr=...)", optimizer=AdamW
    )


@pytest.mark.parametrize("given", [lambda net: None, lambda net: ([SGD(net.parameters())], [])])
def test_what_is_no_optimizer(given: Any) -> None:
    refused(ModelError, "optimizer must be a torch.optim.Optimizer or a function of the model", optimizer=given)


def test_a_function_for_the_optimizer_that_takes_no_model() -> None:
    refused(
        ModelError, "optimizer is called as optimizer(model)", "Write lambda model: ...",
        optimizer=lambda: SGD(model().parameters()),
    )  # fmt: skip


def test_the_class_of_a_model() -> None:
    refused(ModelError, "model is the class Sequential", "Give an object", net=nn.Sequential, optimizer=lambda net: net)


def test_several_models_in_a_list() -> None:
    refused(
        ModelError, "must be an nn.Module, not a list", "Several networks go into one nn.Module",
        net=[model()], optimizer=lambda net: net,
    )  # fmt: skip


def test_a_model_whose_layers_have_no_shape_yet() -> None:
    net = nn.Sequential(nn.LazyLinear(1))
    refused(ModelError, "0.weight, 0.bias have no shape yet", "once on a batch", net=net, optimizer=lambda net: net)


def test_a_scheduler_on_another_optimizer() -> None:
    refused(
        ModelError, "The scheduler was built on another optimizer", "it would change nothing",
        scheduler=StepLR(SGD(linear().parameters()), 1),
    )  # fmt: skip


def test_the_class_of_a_scheduler() -> None:
    refused(ModelError, "scheduler is the class StepLR", "a function of (optimizer, total_steps)", scheduler=StepLR)


def test_the_name_of_a_scheduler() -> None:
    refused(ModelError, "scheduler is the string 'cosine'", "sheer.warmup_cosine(warmup_steps=...)", scheduler="cosine")


def test_the_name_of_an_optimizer() -> None:
    refused(ModelError, "optimizer is the string 'adam'", "torch.optim.AdamW(model.parameters()", optimizer="adam")


def test_a_function_for_the_scheduler_that_takes_the_optimizer_alone() -> None:
    refused(
        ModelError, "scheduler is called as scheduler(optimizer, total_steps)", "Write lambda optimizer, total_steps: ...",
        scheduler=lambda optimizer: StepLR(optimizer, 1),
    )  # fmt: skip


def test_a_function_for_the_scheduler_that_returns_nothing() -> None:
    refused(ModelError, "a NoneType has not", scheduler=lambda optimizer, total: None)


def test_a_function_for_the_scheduler_of_a_run_whose_length_is_not_known() -> None:
    how: dict[str, Any] = {"scheduler": lambda optimizer, total: StepLR(optimizer, total)}
    refused(SettingsError, "that is not known", "Give max_steps, or a scheduler object", max_time=5.0, **how)
    refused(SettingsError, "the loader has no length", loader=iter([1]), max_epochs=1, **how)


def test_a_one_cycle_schedule_that_ends_before_the_run() -> None:
    net = model()
    optimizer = AdamW(net.parameters())
    refused(
        ModelError, "The OneCycleLR ends after 7 steps, and the run has 14", "lambda optimizer, total_steps",
        net=net, optimizer=optimizer, scheduler=OneCycleLR(optimizer, 0.1, total_steps=7), max_epochs=2,
    )  # fmt: skip
    assert fit(scheduler=lambda opt, total: OneCycleLR(opt, 0.1, total_steps=total), max_epochs=2).step == 14


def test_a_plateau_schedule_without_a_monitored_metric() -> None:
    how: dict[str, Any] = {"scheduler": lambda optimizer, total: ReduceLROnPlateau(optimizer)}
    refused(SettingsError, "ReduceLROnPlateau follows the monitored metric", 'Set monitor="val/loss"', **how)
    refused(SettingsError, "ReduceLROnPlateau", val_loader=loader(32, shuffle=False), **how)


def test_a_scheduler_that_waits_for_validations_that_never_come() -> None:
    refused(
        SettingsError, 'scheduler_interval="validation"', "Give fit a val_loader",
        scheduler=lambda optimizer, total: StepLR(optimizer, 1), scheduler_interval="validation",
    )  # fmt: skip


def nan_loss(net: nn.Module, batch: Any, step: int) -> torch.Tensor:
    return loss_step(net, batch) * (float("nan") if step >= 3 else 1.0)


def nan_gradient(net: nn.Module, batch: Any, step: int) -> torch.Tensor:
    loss = loss_step(net, batch)
    return loss + (loss * 0.0).sqrt() if step == 3 else loss  # 0, with the gradient 0 * infinity


def saved_weights() -> list[Any]:
    return [load_file(path) for path in Path("run").rglob("model.safetensors")]


def test_a_loss_that_becomes_nan_names_the_first_bad_step_and_is_never_saved() -> None:
    checkpoint = sheer.Checkpoint(every_n_steps=2, keep_last=9)
    message = refused(
        sheer.NonFiniteError, "The loss became NaN or infinite at step 3", "gradient_clip_val", "detect_anomaly=True",
        step=nan_loss, run_dir="run", checkpoint=checkpoint, updates=None,
    )  # fmt: skip
    assert 'nonfinite="skip"' in message
    assert len(saved_weights()) == 1
    assert all(value.isfinite().all() for weights in saved_weights() for value in weights.values())


def test_weights_that_become_nan_through_a_gradient_are_never_saved() -> None:
    refused(
        sheer.NonFiniteError, "0.weight, 0.bias, 1.weight", "became NaN or infinite by step 3, through a gradient",
        "detect_anomaly=True names the operation", step=nan_gradient, run_dir="run",
        checkpoint=sheer.Checkpoint(every_n_steps=1, keep_last=9), updates=3,
    )  # fmt: skip
    assert len(saved_weights()) == 2
    assert all(value.isfinite().all() for weights in saved_weights() for value in weights.values())


def test_a_gradient_that_becomes_nan_is_named_where_its_norm_is_computed_anyway() -> None:
    refused(
        sheer.NonFiniteError, "The gradient norm became NaN or infinite at step 3",
        step=nan_gradient, gradient_clip_val=1.0, updates=None,
    )  # fmt: skip


def test_skipping_goes_on_and_is_capped() -> None:
    net = model()
    fit(nan_gradient, net=net, nonfinite="skip", max_steps=6)
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    refused(
        sheer.NonFiniteError, "in 100 steps in a row, up to step 102", "Lower the learning rate",
        step=nan_loss, nonfinite="skip", max_steps=200, updates=2,
    )  # fmt: skip


def test_ignoring_goes_on() -> None:
    net = model()
    assert fit(nan_loss, net=net, nonfinite="ignore", max_steps=6).step == 6
    assert not all(parameter.isfinite().all() for parameter in net.parameters())


def test_an_optimizer_that_needs_a_closure() -> None:
    net = model()
    refused(
        ModelError,
        "LBFGS",
        "several times in one step",
        "run.steps",
        net=net,
        optimizer=torch.optim.LBFGS(net.parameters()),
    )


def test_the_first_bad_step_is_named_also_after_thousands_without_a_log_point() -> None:
    watch = Watch()
    for number in range(1, 3001):
        watch.add(number, "loss", torch.tensor(float("nan") if number in (5, 2000) else 1.0))
    with pytest.raises(sheer.NonFiniteError, match="at step 5"):
        watch.check()
    watch.add(3001, "loss", torch.tensor(1.0))
    watch.check()  # what was reported is forgotten


def test_skipped_steps_that_are_not_in_a_row_are_no_reason_to_end() -> None:
    def every_other(net: nn.Module, batch: Any, step: int) -> torch.Tensor:
        return net(batch[0]).mean() * (float("nan") if step % 2 else 1.0)

    assert fit(every_other, nonfinite="skip", max_steps=220).step == 220
