"""Functions as callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sheer.errors import SettingsError
from sheer.events import RunInfo

Stop = str | None


class On:
    """Calls functions at events: `On(step_end=function)`. Each gets the arguments of its event; see docs/events.md.

    Args:
        every_n_steps: call `step_start`, `gradients`, `update` and `step_end` at every n-th step only.

    Raises:
        SettingsError: `every_n_steps` is below 1, or something that is given cannot be called.
    """

    def __init__(
        self,
        *,
        fit_start: Callable[[nn.Module, Mapping[str, Optimizer], RunInfo], None] | None = None,
        epoch_start: Callable[[int, nn.Module], None] | None = None,
        step_start: Callable[[int, nn.Module, Any], None] | None = None,
        gradients: Callable[[int, nn.Module], None] | None = None,
        update: Callable[[int, nn.Module], None] | None = None,
        log: Callable[[int, Mapping[str, float]], Mapping[str, float] | None] | None = None,
        evaluation_start: Callable[[nn.Module], None] | None = None,
        evaluation_end: Callable[[nn.Module], None] | None = None,
        validation_end: Callable[[int, Mapping[str, float]], Stop] | None = None,
        step_end: Callable[[int, nn.Module], Stop] | None = None,
        epoch_end: Callable[[int, nn.Module], Stop] | None = None,
        save: Callable[[int, Path], None] | None = None,
        fit_end: Callable[[int, nn.Module], None] | None = None,
        exception: Callable[[BaseException], None] | None = None,
        every_n_steps: int = 1,
    ) -> None:
        if every_n_steps < 1:
            raise SettingsError(f"On(every_n_steps={every_n_steps!r}): it must be at least 1.")
        every = every_n_steps
        functions: dict[str, Any] = {
            "fit_start": fit_start,
            "epoch_start": epoch_start,
            "step_start": partial(at_every_nth_start, step_start, every) if step_start and every > 1 else step_start,
            "gradients": partial(at_every_nth, gradients, every) if gradients and every > 1 else gradients,
            "update": partial(at_every_nth, update, every) if update and every > 1 else update,
            "log": log,
            "evaluation_start": evaluation_start,
            "evaluation_end": evaluation_end,
            "validation_end": validation_end,
            "step_end": partial(at_every_nth, step_end, every) if step_end and every > 1 else step_end,
            "epoch_end": epoch_end,
            "save": save,
            "fit_end": fit_end,
            "exception": exception,
        }
        for event, function in functions.items():
            if function is not None and not callable(function):
                raise SettingsError(f"On({event}={function!r}): give a function, which is called at this event.")
            if function is not None:
                setattr(self, f"on_{event}", function)  # an event that is not on the object costs nothing


def at_every_nth(function: Callable[[int, nn.Module], Any], every: int, step: int, model: nn.Module) -> Any:
    """Call a function of (step, model) at every n-th step."""
    return function(step, model) if step % every == 0 else None


def at_every_nth_start(
    function: Callable[[int, nn.Module, Any], Any], every: int, step: int, model: nn.Module, batch: Any
) -> Any:
    """Call a function of (step, model, batch) at every n-th step."""
    return function(step, model, batch) if step % every == 0 else None
