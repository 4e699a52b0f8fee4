"""On: functions as callbacks."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD

import sheer
from sheer.events import EVENTS, Events
from tests.task import loader, step, trainer


def fitted(*callbacks: Any) -> sheer.Result:
    net = nn.Linear(6, 1)
    return trainer(callbacks=callbacks, max_epochs=1, log_every_n_steps=7).fit(
        net, step, loader(), loader(50), optimizer=SGD(net.parameters(), lr=0.01)
    )


def test_only_the_events_that_are_given_are_on_the_object() -> None:
    def nothing(*arguments: Any) -> None:
        pass

    for event in EVENTS:
        callback = sheer.On(**{event.removeprefix("on_"): nothing})
        assert [name for name in EVENTS if hasattr(callback, name)] == [event]
    assert list(inspect.signature(sheer.On).parameters) == [field.name for field in dataclasses.fields(Events)] + [
        "every_n_steps"
    ]


def test_every_nth_step() -> None:
    steps: list[Any] = []
    fitted(sheer.On(step_start=lambda step, model, batch: steps.append(step), every_n_steps=3))
    fitted(sheer.On(step_end=lambda step, model: steps.append(-step), every_n_steps=2))
    assert steps == [3, 6, -2, -4, -6]


def test_what_a_function_returns_is_logged_or_stops_the_run() -> None:
    logged: list[Any] = []
    fitted(
        sheer.On(log=lambda step, metrics: {"mine": 1.0}),
        sheer.On(log=lambda step, metrics: logged.append(metrics["mine"])),
    )
    assert logged == [1.0]
    assert fitted(sheer.On(step_end=lambda step, model: "enough", every_n_steps=4)).stopped_by == "enough"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(sheer.SettingsError, match="On has no event"):
        fitted(sheer.On())
    with pytest.raises(sheer.SettingsError, match="give a function"):
        sheer.On(step_end=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="stepend"):
        sheer.On(stepend=print)  # type: ignore[call-arg]
    with pytest.raises(sheer.SettingsError, match=r"sheer\.On\(step_end=function\)"):
        fitted(lambda step, model: None)
