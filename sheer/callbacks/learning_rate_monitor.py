"""Log the learning rate."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from sheer.events import RunInfo


class LearningRateMonitor:
    """Logs the learning rate at each log point, as the schedulers have left it for the next step.

    It is `lr` where there is one parameter group. Several groups give `lr/<name>`, by their key "name" or their number; several
    optimizers `lr/<optimizer>`, and `lr/<optimizer>/<group>` where one has several groups.

    Args:
        momentum: also log `momentum` (the first beta where the optimizer has betas).
        weight_decay: also log `weight_decay`.
    """

    def __init__(self, *, momentum: bool = False, weight_decay: bool = False) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self._optimizers: Mapping[str, Optimizer] = {}

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        """Keep the optimizers."""
        self._optimizers = optimizers

    def on_log(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        """Return the values of all groups."""
        logged: dict[str, float] = {}
        for label, optimizer in self._optimizers.items():
            groups = optimizer.param_groups
            for index, group in enumerate(groups):
                place = f"/{label}" if len(self._optimizers) > 1 else ""
                place += f"/{group.get('name', index)}" if len(groups) > 1 else ""
                logged[f"lr{place}"] = float(group["lr"])
                if self.momentum and ("betas" in group or "momentum" in group):
                    logged[f"momentum{place}"] = float(group["betas"][0] if "betas" in group else group["momentum"])
                if self.weight_decay and "weight_decay" in group:
                    logged[f"weight_decay{place}"] = float(group["weight_decay"])
        return logged
