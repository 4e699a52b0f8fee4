"""EarlyStopping: when it stops, what it says, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import sheer
from tests.task import loader, step, trainer
from tests.test_resume import run


def fitted(losses: list[float], stopping: sheer.EarlyStopping, **settings: Any) -> sheer.Result:
    """Validate once an epoch of 7 steps, with the given metrics."""
    values = iter([losses[0], *losses])  # the first is the try before the first step
    net = nn.Linear(6, 1)

    def eval_step(net: nn.Module, batch: Any) -> dict[str, float]:
        return {"loss": next(values), "error": 1.0}

    return trainer(callbacks=[stopping], max_epochs=len(losses), **settings).fit(
        net,
        step,
        loader(),
        [(torch.zeros(4, 6), torch.zeros(4, 1))],
        eval_step=eval_step,
        optimizer=SGD(net.parameters(), lr=0.01),
    )


def test_stops_after_patience_validations_without_improvement_and_says_why() -> None:
    result = fitted([3.0, 2.0, 2.5, 2.0, 1.0, 0.5], sheer.EarlyStopping(patience=2), monitor="val/loss")
    assert result.epoch == 4
    assert result.stopped_by == "EarlyStopping: val/loss has not improved on 2, of step 14, in 2 validations"


def test_an_improvement_starts_the_count_again() -> None:
    result = fitted([3.0, 4.0, 2.0, 4.0, 1.0, 4.0], sheer.EarlyStopping(patience=2), monitor="val/loss")
    assert result.stopped_by == "max_epochs"


def test_more_is_better_in_mode_max() -> None:
    result = fitted([1.0, 2.0, 3.0, 2.0, 1.0], sheer.EarlyStopping(1), monitor="val/loss", monitor_mode="max")
    assert result.epoch == 4 and "improved on 3, of step 21" in result.stopped_by


def test_min_delta_is_what_an_improvement_must_exceed() -> None:
    result = fitted([3.0, 2.95, 2.93, 2.8, 1.0], sheer.EarlyStopping(2, min_delta=0.1), monitor="val/loss")
    assert result.epoch == 3


def test_its_own_monitor_goes_before_the_trainers() -> None:
    stopping = sheer.EarlyStopping(1, monitor="val/error", mode="min")
    assert fitted([3.0, 2.0, 1.0], stopping, monitor="val/loss").epoch == 2


def test_nan_is_no_improvement_and_is_said() -> None:
    with pytest.warns(sheer.SheerWarning, match="val/loss is NaN at step 14"):
        result = fitted([3.0, float("nan"), 1.0], sheer.EarlyStopping(1), monitor="val/loss")
    assert result.epoch == 2


def test_a_metric_that_is_not_there_is_an_error_that_lists_those_that_are() -> None:
    with pytest.raises(sheer.SettingsError, match=r"'val/acc'.* there are: val/loss, val/error"):
        fitted([1.0], sheer.EarlyStopping(monitor="val/acc", mode="max"))


def test_nothing_to_follow_is_an_error_at_the_start() -> None:
    with pytest.raises(sheer.SettingsError, match="no metric to follow"):
        fitted([1.0], sheer.EarlyStopping())
    with pytest.raises(sheer.SettingsError, match="which way is better"):
        fitted([1.0], sheer.EarlyStopping(monitor="val/error"))


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(sheer.SettingsError, match="patience must be at least 1"):
        sheer.EarlyStopping(0)
    with pytest.raises(sheer.SettingsError, match='"min" or "max"'):
        sheer.EarlyStopping(mode="less")  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [3, 11])
def test_resumes_exactly(stop: int) -> None:
    """A metric that never improves stops both runs at the same step."""

    def made() -> list[Any]:
        return [sheer.EarlyStopping(2, min_delta=1e9)]

    def constant(net: nn.Module, batch: Any) -> Tensor:
        return step(net, batch)["loss"] * 0 + net[0].weight.sum() * 0  # type: ignore[index]

    how: dict[str, Any] = {"make_callbacks": made, "monitor": "val/loss", "max_epochs": 9}
    whole = run("whole", **how)
    run("stopped", stop_at=stop, **how)
    resumed = run("stopped", **how)
    assert resumed["lines"] == whole["lines"] and whole["lines"][-1]["step"] == 21
