"""Linear layers whose products are computed in float8, by torchao; the weights stay what they are."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from sheer.errors import MissingPackageError, ModelError, SettingsError

MULTIPLE = 16  # of which float8 products want the sizes of a layer
CAPABILITY = (8, 9)  # the least of a CUDA device that has such products: Ada, Hopper and newer


def use_float8(model: nn.Module, device: torch.device) -> None:
    """Replace a model's linear layers, in place, by torchao's that compute in float8, scaled by tensor as the values are at each step.

    They hold the same parameters under the same names, in the same precision. Left as they are: layers whose sizes are no
    multiples of 16, the last one (the output), and those that share their weight with another module. A model that has float8
    layers already, made by `torchao.float8.convert_to_float8_training` with a choice of one's own, is not changed.

    Raises:
        SettingsError: the device has no float8 products.
        MissingPackageError: torchao is not installed.
        ModelError: the model has no layer to compute in float8.
    """
    check_float8_device(device)
    if any(is_float8(module) for module in model.modules()):
        return
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise MissingPackageError(
            'precision="float8-mixed" needs torchao. Install it: pip install "sheer[float8]"'
        ) from error
    layers = layers_for_float8(model)
    if not layers:
        raise ModelError(
            f'precision="float8-mixed" computes linear layers in float8, and {type(model).__name__} has none that fits: an nn.Linear inside of it, '
            f'with both sizes multiples of {MULTIPLE}, that is neither the last nor shares its weight. Set precision="bf16-mixed".'
        )
    convert_to_float8_training(
        model, module_filter_fn=_Chosen(layers), config=Float8LinearConfig(emulate=device.type == "cpu")
    )


class _Chosen:
    """Whether a layer is one of those that were chosen, as torchao asks for it."""

    def __init__(self, names: list[str]) -> None:
        self.names = frozenset(names)

    def __call__(self, module: nn.Module, name: str) -> bool:
        return name in self.names


def check_float8_device(device: torch.device) -> None:
    """Raise `SettingsError` for a device that cannot multiply in float8."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY:
        return
    what = (
        f"{torch.cuda.get_device_name(device)} has capability {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
        if device.type == "cuda"
        else f"the device is {device}"
    )
    raise SettingsError(
        f'precision="float8-mixed" needs a CUDA device of capability {".".join(map(str, CAPABILITY))} or more, such as an H100, and {what}. '
        'Set precision="bf16-mixed": checkpoints of both hold the same.'
    )


def layers_for_float8(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that are to compute in float8."""
    shared = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    last = next(reversed(linear), "")
    return [
        name
        for name, layer in linear.items()
        if name != last and shared[id(layer.weight)] == 1 and not any(size % MULTIPLE for size in layer.weight.shape)
    ]


def refuse_float8_layers_in_parts(tensor_ranks: int, stages: int) -> None:
    """Raise `SettingsError` where layers, or the model, are cut into parts that were never tried in float8."""
    if tensor_ranks > 1 or stages > 1:
        raise SettingsError(
            f'precision="float8-mixed" was not tried with tp={tensor_ranks}, pp={stages}, and is refused there. dp_replicate, dp_shard and cp go with it; '
            'or set precision="bf16-mixed".'
        )


def is_float8(module: nn.Module) -> bool:
    """Whether a module is one of torchao's float8 layers, which is asked without importing it."""
    return any(kind.__module__.startswith("torchao.float8.") for kind in type(module).__mro__)


def describe_float8(model: nn.Module) -> str:
    """Say how many of a model's linear layers compute in float8."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return f"float8: {sum(map(is_float8, linear))} of {len(linear)} linear layers; all else as with bf16-mixed"
