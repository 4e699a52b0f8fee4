"""Tensors that are divided over ranks: their whole value, and a whole value's part."""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import Tensor


def is_divided_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is divided over ranks. Where PyTorch's module for such was never imported, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor's full value, on each rank; all ranks must call it."""
    return cast(Any, tensor).full_tensor() if is_divided_tensor(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    return cast(Any, tensor).to_local() if is_divided_tensor(tensor) else tensor


def divided_like(value: Tensor, pattern: Tensor) -> Tensor:
    """Return this rank's part of a whole value that all ranks have, divided as `pattern` is; nothing is sent."""
    if not is_divided_tensor(pattern):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(pattern, DTensor)
    moved = value.to(pattern.to_local().device)
    return distribute_tensor(moved, pattern.device_mesh, pattern.placements, src_data_rank=None)
