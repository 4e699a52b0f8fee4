"""Buffers that training changes, such as the running statistics of batch norms: each rank has its own, and those of the first are used."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from sheer.distributed.mesh import Ranks
from sheer.distributed.tensors import is_divided_tensor


@torch.no_grad()
def same_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Make the buffers that are saved with a model those of the first rank that holds the same layers; all ranks must call it."""
    sizes = {name: getattr(ranks.parallel, name) for name in ("dp_replicate", "dp_shard", "cp", "tp")}
    groups = [ranks.group(name) for name, size in sizes.items() if size > 1]
    buffers = dict(model.named_buffers())
    saved = model.state_dict() if buffers else {}
    for name, buffer in buffers.items():
        if name in saved and not is_divided_tensor(buffer):
            value = buffer.contiguous()
            for group in groups:
                dist.broadcast(value, group=group, group_src=0)
            if value is not buffer:
                buffer.copy_(value)
