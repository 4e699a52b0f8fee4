"""The state of an optimizer by the names of the parameters, so that it fits a model built in another order."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sheer.checkpoint.read import Later
from sheer.errors import RunError

IMPLEMENTATION = frozenset(
    {"foreach", "fused", "capturable", "differentiable"}
)  # these may differ: the device may, too


def plain_number(value: Any) -> Any:
    """Return a number for a tensor that holds one, as a learning rate may."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def is_plain(value: Any) -> bool:
    """Whether an option can be compared with the one that was saved."""
    return isinstance(value, (bool, int, float, str, type(None))) or (
        isinstance(value, tuple) and all(is_plain(item) for item in value)
    )


def names_of(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Return the names of an optimizer's parameters, in its own order; those outside the model are numbered."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [known.get(id(parameter), f"#{index}") for index, parameter in enumerate(parameters)]


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the state of each parameter, and the groups, both by name."""
    names, state = names_of(optimizer, model), optimizer.state_dict()
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return {
        "class": type(optimizer).__name__,
        "options": options_of(optimizer),
        "state": {names[index]: values for index, values in state["state"].items()},
        "groups": groups,
    }


def of_layers(saved: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return what was saved of an optimizer for the layers that a rank of a pipeline holds."""
    groups = [{**group, "params": [name for name in group["params"] if name in names]} for group in saved["groups"]]
    return {**saved, "state": {n: own for n, own in saved["state"].items() if n in names}, "groups": groups}


def options_of(optimizer: Optimizer) -> dict[str, Any]:
    """Return the options that an optimizer was built with, without those that choose an implementation."""
    options = {name: plain_number(value) for name, value in optimizer.defaults.items()}
    return {name: value for name, value in options.items() if name not in IMPLEMENTATION and is_plain(value)}


def load_optimizer_state(optimizer: Optimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    """Take back what `optimizer_state` returned.

    Raises:
        RunError: it is another optimizer, has other options, or its groups hold other parameters than those that were saved.
    """
    names = names_of(optimizer, model)
    refuse_another_optimizer(optimizer, names, saved)
    index_of = {key: index for index, key in enumerate(names)}
    own_groups = optimizer.state_dict()["param_groups"]
    groups = [{**of_saved, "params": own["params"]} for own, of_saved in zip(own_groups, saved["groups"], strict=True)]
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = {index_of[key]: like_its_parameter(value, held[index_of[key]]) for key, value in saved["state"].items()}
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def like_its_parameter(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return what an optimizer keeps for a parameter; tensors of the parameter's shape are divided over ranks as it is."""
    return {name: value.like(parameter) if isinstance(value, Later) else value for name, value in state.items()}


def refuse_another_optimizer(optimizer: Optimizer, names: list[str], state: dict[str, Any]) -> None:
    """Raise `RunError` where an optimizer, whose parameters have these names, is not the one that was saved."""
    if state.get("class", type(optimizer).__name__) != type(optimizer).__name__:  # an ejected script writes neither
        raise RunError(
            f"The optimizer that was saved is {state['class']}, and this one is {type(optimizer).__name__}: its state means nothing here. "
            "Build the same optimizer, or start a new run and take the weights with sheer.load_weights."
        )
    options = options_of(optimizer)
    differing = [
        f"  {name}: {value!r} then, {options[name]!r} now"
        for name, value in state.get("options", {}).items()
        if name in options and options[name] != value
    ]
    if differing:
        raise RunError(
            "The optimizer that was saved was built with other options, which would be put back in place of these:\n"
            + "\n".join(differing)
            + "\nPut them back, or start a new run and take the weights with sheer.load_weights."
        )
    following = iter(names)
    own = [sorted(next(following) for _ in group["params"]) for group in optimizer.param_groups]
    saved = [sorted(group["params"]) for group in state["groups"]]
    if own != saved:
        here, there = set(names), {name for group in saved for name in group}
        raise RunError(
            f"The optimizer that was saved had {len(saved)} parameter groups of {[len(group) for group in saved]} parameters, this one has "
            f"{len(own)} of {[len(group) for group in own]}. Only in this one: {sorted(here - there)[:5]}; only in the saved one: {sorted(there - here)[:5]}."
        )
