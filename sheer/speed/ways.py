"""A way to train: what autotune may choose, and how a run is changed to it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sheer.settings import Settings

# What a way has in common with the settings.
OF_SETTINGS = ("compile", "activation_memory_budget", "cuda_graph", "precision", "micro_batch_size")


@dataclass(frozen=True)
class Way:
    """What autotune may change of a run; the defaults change nothing but what they name in `Settings`."""

    compile: bool | str = False
    activation_memory_budget: float = 1.0  # of what is compiled
    cuda_graph: bool = False
    precision: str = "32-true"
    micro_batch_size: int | None = None
    fused: bool = False  # whether the optimizer is switched to its fused implementation
    num_workers: int | None = None  # of the training loader; None: as it is

    def differences(self, other: Way) -> str:
        """Say in what it differs from another, as `compile=True, fused=True`."""
        fields = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in fields) or "as it is"

    def settings(self, settings: Settings) -> Settings:
        """Return settings changed to this way."""
        return dataclasses.replace(settings, **{name: getattr(self, name) for name in OF_SETTINGS})

    def loader(self, loader: Any) -> Any:
        """Return a loader with this number of workers."""
        if self.num_workers is None:
            return loader
        changed = copy.copy(loader)
        changed.num_workers = self.num_workers
        changed.prefetch_factor = 2  # the default of one that is built with workers
        return changed

    def optimizer(self, optimizer: Optimizer | Callable[[nn.Module], Optimizer]) -> Any:
        """Return an optimizer, or what makes one, switched to its fused implementation if this way is."""
        if not self.fused:
            return optimizer
        return fuse(optimizer, True) if isinstance(optimizer, Optimizer) else FusedBuilder(optimizer)


class FusedBuilder:
    """Makes a user's optimizer, and switches it to its fused implementation."""

    def __init__(self, build: Callable[[nn.Module], Optimizer]) -> None:
        self.build = build

    def __call__(self, model: nn.Module) -> Optimizer:
        """Return the optimizer for a model."""
        return fuse(self.build(model), True)


def own_way(settings: Settings) -> Way:
    """Return the way that settings say."""
    return Way(**{name: getattr(settings, name) for name in OF_SETTINGS})


def can_be_fused(optimizer: Optimizer) -> bool:
    """Whether an optimizer has a fused implementation that was not asked for or against."""
    return "fused" in optimizer.defaults and all(
        group.get("fused") is None and not group.get("differentiable") for group in optimizer.param_groups
    )


def fuse(optimizer: Optimizer, on: bool) -> Optimizer:
    """Switch an optimizer that has not stepped yet to its fused implementation, or back, as its constructor does for `fused=True`."""
    for group in optimizer.param_groups:
        group["fused"] = True if on else None
    optimizer.defaults["fused"] = True if on else None
    optimizer._step_supports_amp_scaling = on  # type: ignore[attr-defined]  # what a gradient scaler asks for; set by the constructor only
    return optimizer
