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

PREFETCHED = 2  # the default of a loader that is built with workers
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
    foreach: bool = False  # or to the one that updates all parameters at once, which is the default on a GPU only
    num_workers: int | None = None  # of the training loader; None: as it is
    prefetch_factor: int | None = None  # batches that each of them holds ready

    def differences(self, other: Way) -> str:
        """Say in what it differs from another, as `compile=True, fused=True`."""
        fields = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in fields) or "as the script has it"

    def settings(self, settings: Settings) -> Settings:
        """Return settings changed to this way."""
        return dataclasses.replace(settings, **{name: getattr(self, name) for name in OF_SETTINGS})

    def loader(self, loader: Any) -> Any:
        """Return a loader with this number of workers, each so many batches ahead."""
        if self.num_workers is None and self.prefetch_factor is None:
            return loader
        changed = copy.copy(loader)
        changed.num_workers = loader.num_workers if self.num_workers is None else self.num_workers
        changed.prefetch_factor = (self.prefetch_factor or PREFETCHED) if changed.num_workers else None
        changed._iterator = None  # workers that persist are those of the loader that was given
        return changed

    def optimizer(self, optimizer: Optimizer | Callable[[nn.Module], Optimizer]) -> Any:
        """Return an optimizer, or what makes one, switched to its fused or its foreach implementation if this way is."""
        if not (self.fused or self.foreach):
            return optimizer
        return self.switch(optimizer, True) if isinstance(optimizer, Optimizer) else SwitchedBuilder(optimizer, self)

    def switch(self, optimizer: Optimizer, on: bool) -> Optimizer:
        """Switch an optimizer that has not stepped yet to the implementation of this way, or back, as its constructor does."""
        for name in [name for name in ("fused", "foreach") if getattr(self, name)]:
            for group in (*optimizer.param_groups, optimizer.defaults):
                group[name] = True if on else None
        if self.fused:
            optimizer._step_supports_amp_scaling = on  # type: ignore[attr-defined]  # what a gradient scaler asks for; set by the constructor only
        return optimizer


class SwitchedBuilder:
    """Makes a user's optimizer, and switches it to the implementation of a way."""

    def __init__(self, build: Callable[[nn.Module], Optimizer], way: Way) -> None:
        self.build, self.way = build, way

    def __call__(self, model: nn.Module) -> Optimizer:
        """Return the optimizer for a model."""
        return self.way.switch(self.build(model), True)


def own_way(settings: Settings) -> Way:
    """Return the way that settings say."""
    return Way(**{name: getattr(settings, name) for name in OF_SETTINGS})


def can_be(implementation: str, optimizer: Optimizer) -> bool:
    """Whether an optimizer has a "fused" or "foreach" implementation, and the script asked neither for one nor against this one."""
    groups = optimizer.param_groups
    return implementation in optimizer.defaults and all(
        group[implementation] is None
        and not (group.get("fused") or group.get("foreach") or group.get("differentiable"))
        for group in groups
    )
