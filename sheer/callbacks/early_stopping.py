"""Stop when a metric of the validation no longer improves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from sheer.errors import SettingsError, SheerWarning, user_level
from sheer.events import RunInfo, starts_anew


class EarlyStopping:
    """Stops the run after `patience` validations in a row without an improvement of a metric.

    Args:
        patience: validations in a row without an improvement that stop the run.
        min_delta: by how much the best value so far must be passed to count as improved.
        monitor: the metric, such as "val/loss"; None: the trainer's `monitor`.
        mode: whether less ("min") or more ("max") of it is better; None: the trainer's `monitor_mode`, if it is the trainer's metric.

    Raises:
        SettingsError: an argument is out of range; at the start where there is no metric to follow; at a validation without it.
    """

    follows: str  # from the start of the run on
    _sign: float  # 1 where less is better, else -1

    def __init__(
        self,
        patience: int = 3,
        min_delta: float = 0.0,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        if patience < 1 or min_delta < 0:
            raise SettingsError(
                f"EarlyStopping(patience={patience!r}, min_delta={min_delta!r}): patience must be at least 1, min_delta at least 0."
            )
        if mode not in (None, "min", "max"):
            raise SettingsError(f'EarlyStopping(mode={mode!r}): mode must be "min" or "max".')
        self.patience, self.min_delta, self.monitor, self.mode = patience, min_delta, monitor, mode
        self._best, self._best_step, self._waited = math.inf, 0, 0

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        """Find out which metric is followed."""
        metric = self.monitor or info.monitor
        if metric is None:
            raise SettingsError(
                'EarlyStopping has no metric to follow. Set monitor="val/loss", say, on the trainer, or EarlyStopping(monitor=..., mode=...).'
            )
        if self.mode is None and metric != info.monitor:
            raise SettingsError(
                f'EarlyStopping(monitor={metric!r}) does not follow the trainer\'s metric, so it must say which way is better: mode="min" or "max".'
            )
        if starts_anew(info):
            self._best, self._best_step, self._waited = math.inf, 0, 0
        self.follows, self._sign = metric, 1.0 if (self.mode or info.monitor_mode) == "min" else -1.0

    def on_validation_end(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Compare with the best value so far; return why the run is to stop, once it is."""
        if self.follows not in metrics:
            raise SettingsError(
                f"EarlyStopping follows {self.follows!r}, which the validation did not return; there are: {', '.join(metrics)}."
            )
        value = metrics[self.follows]
        if math.isnan(value):
            warnings.warn(
                f"{self.follows} is NaN at step {step}: no improvement.", SheerWarning, stacklevel=user_level()
            )
        if self._sign * value < self._best - self.min_delta:
            self._best, self._best_step, self._waited = self._sign * value, step, 0
            return None
        self._waited += 1
        why = f"{self.follows} has not improved on {self._sign * self._best:.6g}, of step {self._best_step:,}, in {self._waited} validations"
        return f"EarlyStopping: {why}" if self._waited >= self.patience else None

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far and what came after it."""
        return {"best": self._best, "best_step": self._best_step, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._best, self._best_step, self._waited = state["best"], state["best_step"], state["waited"]
