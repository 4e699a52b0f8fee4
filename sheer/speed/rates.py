"""Learning rates that updates read on the device, so that a graph that was captured follows a schedule."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_NOT_OPTIONS = ("params", "lr", "initial_lr")


class DeviceRates:
    """The rates of an optimizer, as tensors during its updates; between them the groups hold the plain numbers that schedulers change.

    An optimizer that can read its rate on the device, which `fused=True` and `capturable` say, is made `capturable`: then its count of
    steps is on the device, too. Any other keeps plain numbers, which a graph holds as they were.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self.optimizer, self.rates = optimizer, list[Tensor]()
        self._known: list[float] = []
        self._options: list[tuple[dict[str, Any], str, Any]] = []
        self._hooks: list[Any] = []
        groups = optimizer.param_groups
        self.on_device = all(g.get("fused") or "capturable" in g for g in groups)
        self._was_capturable = [g.get("capturable") for g in groups]
        if not self.on_device or any(isinstance(g["lr"], Tensor) for g in groups):
            return
        warnings.filterwarnings(
            "ignore", "This instance was constructed with capturable=True"
        )  # steps before a capture
        for group in groups:
            if "capturable" in group:
                group["capturable"] = True
        self._put_counts(device)
        self.rates = [torch.zeros((), device=device) for _ in groups]
        self._known = [math.nan for _ in groups]
        self._hooks = [optimizer.register_step_pre_hook(self._put), optimizer.register_step_post_hook(self._take)]

    def bring(self) -> None:
        """Copy the rates to the device, those that changed; nothing waits."""
        for index, rate in enumerate(self.rates):
            group = self.optimizer.param_groups[index]
            value = group["lr"]
            if value != self._known[index] and value is not rate:
                rate.fill_(value)
                self._known[index] = value

    def hold_options(self) -> None:
        """Remember the options of the groups, as a graph that is captured now does."""
        ignored = _NOT_OPTIONS if self.rates else _NOT_OPTIONS[:1]
        self._options = [
            (group, name, value)
            for group in self.optimizer.param_groups
            for name, value in group.items()
            if name not in ignored and not isinstance(value, Tensor)
        ]

    def changed_option(self) -> str | None:
        """Return what has changed since `hold_options`, in words; None: nothing."""
        for group, name, value in self._options:
            if group[name] != value:
                return f"the optimizer's {name} went from {value} to {group[name]}"
        return None

    def release(self) -> None:
        """Make the optimizer again what it was."""
        for hook in self._hooks:
            hook.remove()
        for group, before in zip(self.optimizer.param_groups, self._was_capturable, strict=True):
            if before is not None:
                group["capturable"] = before
        if not all(g.get("fused") or g.get("capturable") for g in self.optimizer.param_groups):
            self._put_counts(torch.device("cpu"))
        self.rates, self._hooks = [], []

    def _put_counts(self, device: torch.device) -> None:
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(device, torch.float32)

    def _put(self, *_: Any) -> None:
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self.bring()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate

    def _take(self, *_: Any) -> None:
        for group, value in zip(self.optimizer.param_groups, self._known, strict=True):
            group["lr"] = value
