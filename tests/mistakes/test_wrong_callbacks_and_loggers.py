"""Callbacks and loggers that would never be called, or not as they expect: refused before step 1."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import sheer
from sheer import RunError, SettingsError
from tests.mistakes.common import refused


class Misspelt:
    def on_train_step_end(self, step: int, model: nn.Module) -> None: ...


class Fine:
    def on_step_end(self, step: int, model: nn.Module) -> None: ...


class OfAnotherLibrary:
    def on_step_end(self, trainer: Any) -> None: ...


class WithoutEvents:
    def step_end(self, step: int) -> None: ...


def test_a_misspelt_event_is_named_with_the_nearest() -> None:
    refused(
        SettingsError, "Misspelt.on_train_step_end is no event, so it would never be called", "Did you mean on_step_end?",
        callbacks=[Misspelt()],
    )  # fmt: skip


def test_the_class_of_a_callback() -> None:
    refused(SettingsError, "callbacks holds the class Fine; give an object: Fine()", callbacks=[Fine])


def test_a_function_as_a_callback() -> None:
    refused(SettingsError, "function has no event", "name its event", callbacks=[lambda step, model: None])


def test_a_callback_without_events() -> None:
    refused(
        SettingsError, "WithoutEvents has no event, so it would do nothing", "The events are on_fit_start, on_epoch_start",
        callbacks=[WithoutEvents()],
    )  # fmt: skip


def test_an_event_that_takes_other_arguments() -> None:
    refused(
        SettingsError, "OfAnotherLibrary.on_step_end is called with (step, model), and it takes (trainer",
        callbacks=[OfAnotherLibrary()],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["callbacks", "loggers"])
def test_one_object_where_a_list_is_expected(name: str) -> None:
    refused(SettingsError, f"{name} must be a list, not a Fine", **{name: Fine()})


class WithAverages(Fine):
    def averages(self) -> None: ...


def test_two_callbacks_that_both_have_weights_for_the_evaluation() -> None:
    refused(
        SettingsError, "WithAverages and WithAverages both have weights for evaluation", "Leave one out",
        callbacks=[WithAverages(), WithAverages()],
    )  # fmt: skip


class Unsavable(Fine):
    def state_dict(self) -> dict[str, Any]:
        return {"history": [1, object()]}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_a_state_that_cannot_be_saved_is_found_at_the_start() -> None:
    refused(
        RunError, "The state at 'callbacks/Unsavable/history/1' holds a object, which a checkpoint cannot hold",
        "Leave it out of state_dict", callbacks=[Unsavable()],
    )  # fmt: skip


class NoLogger:
    def log(self, step: int, metrics: Any) -> None: ...


def test_what_is_no_logger() -> None:
    refused(SettingsError, "NoLogger lacks start, close", loggers=[NoLogger()])
    refused(SettingsError, "bool lacks start, log, close", loggers=[True])


def test_the_class_of_a_logger() -> None:
    refused(SettingsError, "loggers holds the class JSONL; give an object: JSONL()", loggers=[sheer.JSONL])


@pytest.mark.parametrize("name", ["callbacks", "loggers"])
def test_a_generator_which_would_be_empty_at_the_second_look(name: str) -> None:
    refused(sheer.SettingsError, f"{name} must be a list, not a generator", **{name: (x for x in [sheer.EMA()])})
