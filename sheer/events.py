"""The events of a run, and which callbacks have each. A callback is any object with some of these methods."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sheer.distributed.mesh import Ranks
from sheer.errors import SettingsError


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a callback or logger is told at the start of a run."""

    run_id: str
    run_dir: Path
    device: torch.device
    start_step: int  # the steps that were done before: 0, or where the run goes on
    total_steps: int | None  # the steps of the whole run; None where only time or the data's end tells
    steps_per_epoch: int | None
    log_every_n_steps: int
    monitor: str | None
    monitor_mode: str
    hparams: Mapping[str, Any]
    settings: Mapping[str, Any]
    ranks: Ranks | None = None  # those that train together, with their mesh; None: this process does alone


def starts_anew(info: RunInfo) -> bool:
    """Whether a run starts at its first step, so that a callback that was in another begins again."""
    return info.start_step == 0


class OnFitStart(Protocol):
    """Once, before the first step, after a checkpoint was restored; for callbacks with a state again where the run goes back to one."""

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:  # noqa: D102
        ...


class OnEpochStart(Protocol):
    """Before the first step of an epoch."""

    def on_epoch_start(self, epoch: int, model: nn.Module) -> None:  # noqa: D102
        ...


class OnStepStart(Protocol):
    """Before the forward pass of a step, its batch on the device."""

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:  # noqa: D102
        ...


class OnGradients(Protocol):
    """The gradients of a step are complete and unscaled, not clipped; they may be changed."""

    def on_gradients(self, step: int, model: nn.Module) -> None:  # noqa: D102
        ...


class OnUpdate(Protocol):
    """An optimizer has changed the parameters."""

    def on_update(self, step: int, model: nn.Module) -> None:  # noqa: D102
        ...


class OnLog(Protocol):
    """At a log point; what it returns is logged with the rest."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float] | None:  # noqa: D102
        ...


class OnEvaluationStart(Protocol):
    """Before a validation, test or prediction; weights changed here are to be put back at its end."""

    def on_evaluation_start(self, model: nn.Module) -> None:  # noqa: D102
        ...


class OnEvaluationEnd(Protocol):
    """After a validation, test or prediction, also after one that failed."""

    def on_evaluation_end(self, model: nn.Module) -> None:  # noqa: D102
        ...


class OnValidationEnd(Protocol):
    """After a validation during training, with its metrics. A string returned stops the run, and is the reason."""

    def on_validation_end(self, step: int, metrics: Mapping[str, float]) -> str | None:  # noqa: D102
        ...


class OnStepEnd(Protocol):
    """At the end of a step, after logging and validation, before saving. A string returned stops the run."""

    def on_step_end(self, step: int, model: nn.Module) -> str | None:  # noqa: D102
        ...


class OnEpochEnd(Protocol):
    """At the end of an epoch, after its validation, before saving. A string returned stops the run."""

    def on_epoch_end(self, epoch: int, model: nn.Module) -> str | None:  # noqa: D102
        ...


class OnSave(Protocol):
    """A checkpoint was committed."""

    def on_save(self, step: int, path: Path) -> None:  # noqa: D102
        ...


class OnFitEnd(Protocol):
    """Once, at the end of the run, after the last save."""

    def on_fit_end(self, step: int, model: nn.Module) -> None:  # noqa: D102
        ...


class OnException(Protocol):
    """The run ends by an error."""

    def on_exception(self, error: BaseException) -> None:  # noqa: D102
        ...


@runtime_checkable
class Follows(Protocol):
    """Follows a metric of the validation, named from `on_fit_start` on; the try before the first step sees that it is there."""

    follows: str


class Averages(Protocol):
    """Has weights of its own that evaluation uses instead of the trained ones, as EMA and SWA do."""

    def averages(self) -> dict[str, Tensor] | None:
        """Return the averages by the model's names, or None while there are none."""

    def load_averages(self, weights: Mapping[str, Tensor]) -> None:
        """Take the averages back from a checkpoint: all of the model's weights by name, before `on_fit_start`."""


@dataclass(frozen=True, slots=True)
class Events:
    """For each event the callbacks that have it, in the order they were given."""

    fit_start: tuple[OnFitStart, ...] = ()
    epoch_start: tuple[OnEpochStart, ...] = ()
    step_start: tuple[OnStepStart, ...] = ()
    gradients: tuple[OnGradients, ...] = ()
    update: tuple[OnUpdate, ...] = ()
    log: tuple[OnLog, ...] = ()
    evaluation_start: tuple[OnEvaluationStart, ...] = ()
    evaluation_end: tuple[OnEvaluationEnd, ...] = ()
    validation_end: tuple[OnValidationEnd, ...] = ()
    step_end: tuple[OnStepEnd, ...] = ()
    epoch_end: tuple[OnEpochEnd, ...] = ()
    save: tuple[OnSave, ...] = ()
    fit_end: tuple[OnFitEnd, ...] = ()
    exception: tuple[OnException, ...] = ()


def end_by_callbacks(events: Events) -> bool:
    """Whether a run may end because a callback said so."""
    return bool(events.validation_end or end_anywhere(events))


def end_anywhere(events: Events) -> bool:
    """Whether a run may end so on any step, not only behind a validation."""
    return bool(events.step_end or events.epoch_end)


EVENTS = tuple(f"on_{field.name}" for field in fields(Events))
ARGUMENTS = {
    name: tuple(inspect.signature(getattr(protocol, name)).parameters)[1:]
    for name, protocol in zip(
        EVENTS,
        (
            OnFitStart, OnEpochStart, OnStepStart, OnGradients, OnUpdate, OnLog, OnEvaluationStart, OnEvaluationEnd,
            OnValidationEnd, OnStepEnd, OnEpochEnd, OnSave, OnFitEnd, OnException,
        ),
        strict=True,
    )
}  # fmt: skip


def events_of(callbacks: Sequence[object]) -> Events:
    """Sort callbacks by the events they have.

    Raises:
        SettingsError: an object has none of the events, or a method that looks like one and is not, or takes other arguments.
    """
    if not isinstance(callbacks, Sequence):  # a generator would be empty at the second look
        raise SettingsError(f"callbacks must be a list, not a {type(callbacks).__name__}: callbacks=[...].")
    for callback in callbacks:
        check_callback(callback)
    by_event: dict[str, Any] = {
        field.name: tuple(callback for callback in callbacks if hasattr(callback, f"on_{field.name}"))
        for field in fields(Events)
    }
    return Events(**by_event)


def check_callback(callback: object) -> None:
    """Raise `SettingsError` for an object whose events would not be called."""
    if isinstance(callback, type):
        raise SettingsError(f"callbacks holds the class {callback.__name__}; give an object: {callback.__name__}().")
    methods = [name for name in dir(callback) if name.startswith("on_") and callable(getattr(callback, name))]
    for name in methods:
        if name not in EVENTS:
            near = difflib.get_close_matches(name, EVENTS, n=1)
            advice = f"Did you mean {near[0]}?" if near else f"The events are {', '.join(EVENTS)}."
            raise SettingsError(f"{type(callback).__name__}.{name} is no event, so it would never be called. {advice}")
        _check_arguments(callback, name)
    if not methods:
        hint = " To use a function, name its event: sheer.On(step_end=function)." if callable(callback) else ""
        raise SettingsError(
            f"{type(callback).__name__} has no event, so it would do nothing. The events are {', '.join(EVENTS)}.{hint}"
        )


def _check_arguments(callback: object, name: str) -> None:
    signature = inspect.signature(getattr(callback, name))
    try:
        signature.bind(*ARGUMENTS[name])
    except TypeError as error:
        raise SettingsError(
            f"{type(callback).__name__}.{name} is called with ({', '.join(ARGUMENTS[name])}), and it takes {signature}."
        ) from error


def named(callbacks: Iterable[object]) -> dict[str, Any]:
    """Return the callbacks that have state, by the name their state is saved under: the class, numbered where one repeats."""
    out: dict[str, Any] = {}
    for callback in callbacks:
        if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
            name = type(callback).__name__
            while name in out:
                stem, _, number = name.partition("-")
                name = f"{stem}-{int(number or 1) + 1}"
            out[name] = callback
    return out
