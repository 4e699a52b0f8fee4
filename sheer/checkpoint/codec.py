"""State as JSON and tensors: what a checkpoint may hold. Nothing in it can run code when it is read back."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sheer.errors import RunError

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_TAGS = ("$tensor", "$tuple", "$dict", "$set", "$float", "$bytes", "$dtype", "$device")


def encode(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Return `value` as JSON; the tensors in it go into `tensors`, named by their path.

    Raises:
        RunError: something in it is neither a tensor nor a plain value; it names the path.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"$tensor": path}
    if isinstance(value, np.generic):
        return encode(value.item(), tensors, path)
    if isinstance(value, np.ndarray):
        return encode(torch.from_numpy(value), tensors, path)
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and not any(key in value for key in _TAGS):
            return {key: encode(item, tensors, _joined(path, key)) for key, item in value.items()}
        pairs = [[encode(key, tensors, path), encode(item, tensors, _joined(path, key))] for key, item in value.items()]
        return {"$dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [encode(item, tensors, _joined(path, index)) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, (set, frozenset)):
        return {
            "$set": [encode(item, tensors, _joined(path, index)) for index, item in enumerate(sorted(value, key=repr))]
        }
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    raise RunError(
        f"The state at {path!r} holds a {type(value).__name__}, which a checkpoint cannot hold: it takes tensors, numbers, strings, "
        "lists, dicts and None. Leave it out of state_dict and make it anew when the run starts."
    )


def _joined(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)


class Tensors(Protocol):
    """Tensors, or what stands for them, by name."""

    def __getitem__(self, name: str, /) -> Any:
        """Return one."""


def decode(value: Any, tensors: Tensors) -> Any:
    """Return what `encode` was given.

    Raises:
        LookupError, TypeError, ValueError, RuntimeError: it is nothing that `encode` returns.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": name}:
            return tensors[name]
        case {"$tuple": items}:
            return tuple(decode(item, tensors) for item in items)
        case {"$dict": pairs}:
            return {decode(key, tensors): decode(item, tensors) for key, item in pairs}
        case {"$set": items}:
            return {decode(item, tensors) for item in items}
        case {"$float": text}:
            return float(text)
        case {"$bytes": text}:
            return base64.b64decode(text)
        case {"$dtype": name}:
            return _DTYPES[name]
        case {"$device": name}:
            return torch.device(name)
    return {key: decode(item, tensors) for key, item in value.items()}
