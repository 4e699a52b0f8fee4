"""The state of an optimizer by the names of the parameters, so that it fits a model built in another order."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from sheer.errors import RunError


class NamedOptimizer:
    """An optimizer whose `state_dict` speaks of parameters by name."""

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self.optimizer, self.model = optimizer, model

    def _names(self) -> list[str]:
        """Return the names of the optimizer's parameters, in its own order; those outside the model are numbered."""
        known = {id(parameter): name for name, parameter in self.model.named_parameters()}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return [known.get(id(parameter), f"#{index}") for index, parameter in enumerate(parameters)]

    def _grouped(self, names: list[str]) -> list[list[str]]:
        """Return names, in the order of `_names`, group by group."""
        following = iter(names)
        return [[next(following) for _ in group["params"]] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each parameter, and the groups, both by name."""
        names, state = self._names(), self.optimizer.state_dict()
        groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
        return {"state": {names[index]: values for index, values in state["state"].items()}, "groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            RunError: the groups hold other parameters than those that were saved.
        """
        names = self._names()
        index_of = {name: index for index, name in enumerate(names)}
        own = [sorted(names_of_group) for names_of_group in self._grouped(names)]
        saved = [sorted(group["params"]) for group in state["groups"]]
        if own != saved:
            here, there = set(names), {name for group in saved for name in group}
            raise RunError(
                f"The optimizer that was saved had {len(saved)} parameter groups of {[len(group) for group in saved]} parameters, this one has "
                f"{len(own)} of {[len(group) for group in own]}. Only in this one: {sorted(here - there)[:5]}; only in the saved one: {sorted(there - here)[:5]}."
            )
        groups = []
        for now, group in zip(self.optimizer.state_dict()["param_groups"], state["groups"], strict=True):
            groups.append({**group, "params": now["params"]})
        values = {index_of[name]: value for name, value in state["state"].items()}
        self.optimizer.load_state_dict({"state": values, "param_groups": groups})
