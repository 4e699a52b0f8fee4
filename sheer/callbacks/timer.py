"""Where the time goes, and a stop after a time of training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sheer.errors import SettingsError
from sheer.events import RunInfo


class Timer:
    """Logs `time/total`, `time/train`, `time/validation` and `time/saving` at each log point: seconds since the start, resumed runs counted in.

    `time/saving` is what training waited for: of a checkpoint that is written beside training, not the writing; the copy counts as training.

    Args:
        stop_after: seconds of training, without validations and saves, after which the run stops (the trainer's `max_time` counts all).

    Raises:
        SettingsError: `stop_after` is not above 0.
    """

    def __init__(self, *, stop_after: float | timedelta | None = None) -> None:
        self.stop_after = stop_after.total_seconds() if isinstance(stop_after, timedelta) else stop_after
        if self.stop_after is not None and self.stop_after <= 0:
            raise SettingsError(f"Timer(stop_after={stop_after!r}): the seconds of training must be above 0.")
        self._before = self._validation = self._saving = 0.0
        self._began = self._evaluated = self._step_ended = time.perf_counter()
        self._loaded = False

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        """Start the clock."""
        if not self._loaded:
            self._before = self._validation = self._saving = 0.0
        self._loaded = False
        self._began = time.perf_counter()

    def on_evaluation_start(self, model: nn.Module) -> None:
        """Start the clock of validations."""
        self._evaluated = time.perf_counter()

    def on_evaluation_end(self, model: nn.Module) -> None:
        """Stop the clock of validations."""
        self._validation += time.perf_counter() - self._evaluated

    def on_log(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        """Return the seconds."""
        total = self._total()
        return {
            "time/total": total,
            "time/train": total - self._validation - self._saving,
            "time/validation": self._validation,
            "time/saving": self._saving,
        }

    def on_step_end(self, step: int, model: nn.Module) -> str | None:
        """Stop the run once it has trained long enough."""
        self._step_ended = time.perf_counter()
        trained = self._total() - self._validation - self._saving
        if self.stop_after is not None and trained >= self.stop_after:
            return f"Timer: {self.stop_after:g} seconds of training"
        return None

    def on_save(self, step: int, path: Path) -> None:
        """Count the time since the end of the step as saving."""
        self._saving += time.perf_counter() - self._step_ended

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds so far."""
        return {"total": self._total(), "validation": self._validation, "saving": self._saving}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._before, self._validation, self._saving = state["total"], state["validation"], state["saving"]
        self._loaded = True

    def _total(self) -> float:
        return self._before + time.perf_counter() - self._began
