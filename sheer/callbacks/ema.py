"""The exponential moving average of the weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sheer.averaging import AveragedWeights
from sheer.errors import SettingsError, SheerWarning, user_level
from sheer.events import RunInfo


class EMA:
    """Keeps an exponential moving average of the weights, which evaluation and the model in checkpoints use.

    After each step average = decay * average + (1 - decay) * weights, by torch.optim.swa_utils; the first average is a copy of the
    weights. Buffers are not averaged: evaluation uses the model's own, which are those of the last step. The trained weights are in
    the model at all other times, also after `fit`, and in the checkpoint's `training.safetensors`. To go on with the averages:
    `model.load_state_dict(ema.averages(), strict=False)`.

    Args:
        decay: the share of the old average that stays, from 0 to 1.
        every_n_steps: average after every n-th step only.
        start_step: steps that pass before the first average.

    Raises:
        SettingsError: an argument is out of range.
    """

    def __init__(self, decay: float = 0.999, *, every_n_steps: int = 1, start_step: int = 0) -> None:
        if not 0.0 <= decay <= 1.0:
            raise SettingsError(f"EMA(decay={decay!r}): the share of the old average is from 0 to 1, such as 0.999.")
        if every_n_steps < 1 or start_step < 0:
            raise SettingsError(
                f"EMA(every_n_steps={every_n_steps!r}, start_step={start_step!r}): the first must be at least 1, the second at least 0."
            )
        self.decay, self.every_n_steps, self.start_step = decay, every_n_steps, start_step
        self._combine = get_ema_multi_avg_fn(decay)
        self._weights = AveragedWeights()
        self._due = False

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        """Find the parameters that the optimizers hold."""
        self._weights.bind(model, optimizers)

    def on_update(self, step: int, model: nn.Module) -> None:
        """Note that the weights have changed: with several optimizers this comes several times a step."""
        self._due = step > self.start_step and step % self.every_n_steps == 0

    def on_step_end(self, step: int, model: nn.Module) -> None:
        """Average the weights, all optimizers having changed them."""
        if self._due:
            self._due = False
            self._weights.average(self._combine, 0)

    def on_evaluation_start(self, model: nn.Module) -> None:
        """Put the averages into the model, with those of the step that is validated."""
        if self._due:
            self._due = False
            self._weights.average(self._combine, 0)
        self._weights.swap_in(model)

    def on_evaluation_end(self, model: nn.Module) -> None:
        """Put the trained weights back."""
        self._weights.swap_out(model)

    def averages(self) -> dict[str, Tensor] | None:
        """Return the averages by the names of the model's parameters, or None before the first."""
        return self._weights.by_name()

    def load_averages(self, weights: Mapping[str, Tensor]) -> None:
        """Take the averages that a checkpoint holds."""
        self._weights.load(weights)

    def state_dict(self) -> dict[str, Any]:
        """Return how the averages were made."""
        return {"decay": self.decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn where the averages that go on were made otherwise."""
        if state["decay"] != self.decay:
            warnings.warn(
                f"The averages were made with EMA(decay={state['decay']!r}), and go on with decay={self.decay!r}.",
                SheerWarning,
                stacklevel=user_level(),
            )
