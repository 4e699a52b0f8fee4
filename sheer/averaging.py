"""A second set of values for the parameters that are trained, which evaluation and checkpoints use instead of the trained ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sheer.distributed.tensors import divided_like


class AveragedWeights:
    """Averages of all parameters that the optimizers hold, updated by a function of torch.optim.swa_utils on lists of tensors.

    There are none until the first call of `average`, which copies, as that of torch's AveragedModel does. Parameters of 16 bits are
    averaged in float32: steps as small as those of an average would be rounded away in them.
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []  # empty while there are none
        self._model: nn.Module | None = None
        self._parameters: list[nn.Parameter] = []
        self._index_of: dict[str, int] = {}  # tied parameters have several names
        self._narrow = False
        self._loaded: Mapping[str, Tensor] | None = None
        self._held: list[Tensor] = []
        self._depth = 0

    def bind(self, model: nn.Module, optimizers: Mapping[str, Optimizer]) -> None:
        """Start on the parameters of `model` that the optimizers hold, with the values of `load` if there were any."""
        trained = {id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]}
        self._bind(model, trained)

    def _bind(self, model: nn.Module, ids: set[int]) -> None:
        places: dict[int, int] = {}
        self._model, self._parameters, self._index_of = model, [], {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in ids:
                if id(parameter) not in places:
                    places[id(parameter)] = len(self._parameters)
                    self._parameters.append(parameter)
                self._index_of[name] = places[id(parameter)]
        self._narrow = any(averaged_dtype(p) != p.dtype for p in self._parameters)
        self.values = []
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            name_of = {index: name for name, index in self._index_of.items()}
            for index, parameter in enumerate(self._parameters):
                value = loaded[name_of[index]].to(averaged_dtype(parameter))
                self.values.append(divided_like(value, parameter).to(parameter.device, copy=True))

    def average(self, combine: Callable[[Any, Any, Any], None], count: int) -> None:
        """Average the parameters as they are now into the values: `combine(values, parameters, count)`."""
        if not self.values:
            self.values = [p.detach().to(averaged_dtype(p), copy=True) for p in self._parameters]
        elif self._narrow:
            wide = [p.detach().to(value.dtype) for p, value in zip(self._parameters, self.values, strict=True)]
            combine(self.values, wide, count)
        else:
            combine(self.values, self._parameters, count)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take values by name, for the model that `bind` or the first evaluation will name."""
        self._loaded = weights
        self._model = None

    def swap_in(self, model: nn.Module) -> bool:
        """Copy the averages into the model, in place; nothing for a model that they are not of. Returns whether they are in."""
        if self._model is None and self._loaded is not None:  # a finished run was restored, and is evaluated
            self._bind(model, {id(p) for name, p in model.named_parameters() if name in self._loaded})
        if model is not self._model or not self.values:
            return False
        self._depth += 1
        if self._depth == 1:
            self._held = [p.detach().clone() for p in self._parameters]
            copy_into(self._parameters, self.values)
        return True

    def swap_out(self, model: nn.Module) -> bool:
        """Copy the trained values back; returns whether the averages had been in."""
        if model is not self._model or self._depth == 0:
            return False
        self._depth -= 1
        if self._depth == 0:
            copy_into(self._parameters, self._held)
            self._held = []
        return True

    def by_name(self) -> dict[str, Tensor] | None:
        """Return the averages by all names of the parameters, or None while there are none."""
        if not self.values:
            return None
        return {name: self.values[index] for name, index in self._index_of.items()}


def averaged_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype that a parameter is averaged in."""
    return torch.float32 if parameter.dtype in (torch.float16, torch.bfloat16) else parameter.dtype


@torch.no_grad()
def copy_into(targets: list[Any], values: list[Tensor]) -> None:
    """Copy values into tensors, in place."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
