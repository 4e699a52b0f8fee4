"""Context parallelism: the ranks of a group share each sequence, and attention still sees all of it.

Every rank trains on its part of each sequence (see `sheer.distributed.sequence`). All that a transformer does with a token by itself
goes on as it was; only attention needs the others' tokens. Within `attention_over(group)` each call of `F.scaled_dot_product_attention`
gathers the keys and values of the whole sequence from the ranks and lets this rank's queries attend to those that they may see.
Backward, each rank's gradients of all keys and values are added up, and each gets its own. What comes out is the attention of the
whole sequence, exactly.

Why keys and values are gathered, and not passed around a ring: a ring hides its transfers behind the computation and never holds all
keys at once, but it needs attention kernels that return the logarithm of their sums, which PyTorch has only as private operators that
differ by device, and it merges their results, with another rounding. Gathering needs one public function and whatever kernel it picks,
also on a CPU. Its transfers grow with the sequence T, the computation with T * T, so that it is the long sequences where
they matter least; with grouped queries, keys and values are a fraction of the activations anyway. The price is memory: each layer
keeps keys and values of the whole sequence for its backward, unless it is checkpointed.

How calls are intercepted: the function is exchanged in `torch.nn.functional`, and wherever it was imported from there. A
`TorchFunctionMode` would also find a function kept in an object; but it is not there in backward, where checkpoints call attention
again, and costs every other function of PyTorch a microsecond. Where no call is intercepted at all, that is an error.

What it does not do: attention with a mask of its own (padding, documents that share a sequence), dropout inside attention,
`nn.MultiheadAttention` and what is made of it: these are refused. FlexAttention is not seen, and would attend to this rank's
tokens only. Under `torch.compile` all of it holds, and a model traced outside of `attention_over` is traced again within; each
causal attention is then a break in the graph (so `fullgraph=True` fails), attention to everything is part of it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.overrides import get_overridable_functions, get_testing_overrides

from sheer.errors import StepError

_ATTENTION, _HIDDEN = F.scaled_dot_product_attention, F.multi_head_attention_forward
# Their names since 2.13, and before.
_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_scatter_sums = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor


@contextmanager
def attention_over(group: ProcessGroup, required: bool = True) -> Iterator[None]:
    """Let every call of `F.scaled_dot_product_attention` in the block attend over the sequences that the ranks of a group share.

    Each rank must hold the chunks that `cut_sequence` gives it, and make the same calls in the same order. Backward belongs into the
    block too: what is checkpointed calls attention again there. The gradients of the parameters are each rank's own part: their
    sum over the group is that of the whole sequence.

    Args:
        group: the ranks that share each sequence.
        required: whether attention must be called: not in a stage of a pipeline that has none.

    Raises:
        StepError: attention was called as cannot be done here, or not at all.
    """
    attention = _attention_over(group)
    attention.called = False
    before = [(module, name, getattr(module, name)) for module, name in _places()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for module, name, function in before:
            setattr(module, name, _HiddenAttention() if function is _HIDDEN else attention)
        torch.backends.mha.set_fastpath_enabled(False)  # which would not come by
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)
        torch.backends.mha.set_fastpath_enabled(fast)
    if required and not attention.called:
        raise StepError(
            "With cp > 1 the step called no F.scaled_dot_product_attention, so no token has seen those that other ranks hold. Call it in "
            "the model, by this name, or set cp=1."
        )


class _GatheredAttention:
    """Stands for `F.scaled_dot_product_attention`; always the same for a group, so that nothing is compiled again for it."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.called = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.called = True
        return gathered_attention(self.group, *args, **kwargs)


@functools.cache
def _attention_over(group: ProcessGroup) -> _GatheredAttention:
    get_overridable_functions(), get_testing_overrides()  # tables that PyTorch makes once, before anything is exchanged
    return _GatheredAttention(group)


def _places() -> list[tuple[ModuleType, str]]:
    """Return where attention is called from: `torch.nn.functional`, and modules that have imported the function itself."""
    return [(F, _ATTENTION.__name__), (F, _HIDDEN.__name__), *_imported_by(len(sys.modules))]


@functools.lru_cache(maxsize=1)
def _imported_by(modules: int) -> list[tuple[ModuleType, str]]:
    """Look for the function in all modules outside of PyTorch; again when there are others than before (some 10 ms)."""
    own = {
        name: module for name, module in sys.modules.items() if name.partition(".")[0] != "torch" and name != __name__
    }
    return [
        (module, name)
        for module in own.values()
        for name, value in (list(vars(module).items()) if isinstance(module, ModuleType) else [])
        if value is _ATTENTION
    ]


class _HiddenAttention:
    """Stands for what `nn.MultiheadAttention` calls, and refuses."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        raise StepError(
            "nn.MultiheadAttention cannot attend over a sequence that several ranks share: it may compute attention by itself. Use "
            "F.scaled_dot_product_attention in the model, or set cp=1."
        )


def gathered_attention(
    group: ProcessGroup,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the attention of this rank's queries over the keys and values of all ranks of a group.

    Args:
        group: the ranks that share the sequence.
        query: [..., heads, time, width], time being that of this rank's two chunks.
        key: [..., heads or their groups, time, width].
        value: [..., heads or their groups, time, width of the values].
        attn_mask: must be None.
        dropout_p: must be 0.
        is_causal: whether a query sees only the keys up to its own place in the whole sequence.
        scale: as for `F.scaled_dot_product_attention`.
        enable_gqa: whether several heads of queries share one of keys.

    Raises:
        StepError: a mask, dropout, or causal attention between sequences of different lengths.
    """
    if attn_mask is not None:
        raise StepError(
            f"Attention was called with a mask of shape {list(attn_mask.shape)}, which covers this rank's part of the sequence, not the whole. "
            "With cp > 1, attention is causal (is_causal=True) or sees everything (no mask)."
        )
    if dropout_p > 0:
        raise StepError(
            f"Attention was called with dropout_p={dropout_p}; with cp > 1 it must be 0. Drop out elsewhere."
        )
    if is_causal and (query.shape[-2] != key.shape[-2] or query.shape[-2] % 2):
        raise StepError(
            f"Causal attention of {query.shape[-2]} queries over {key.shape[-2]} keys on each rank: both must be the two chunks of one "
            "sequence that cut_sequence gives."
        )
    query, key, value = (_as_autocast(part) for part in (query, key, value))
    keys, values = (_all_gather(part, group) for part in (key, value))
    if not is_causal:
        keys, values = (torch.cat([*parts], dim=-2) for parts in (keys, values))
        return _ATTENTION(query, keys, values, scale=scale, enable_gqa=enable_gqa)
    keys, values = _in_order(keys), _in_order(values)
    rank, size, chunk = dist.get_rank(group), dist.get_world_size(group), query.shape[-2] // 2
    attended = [
        attend_to_prefix(queries, keys, values, (index + 1) * chunk, scale, enable_gqa)
        for index, queries in zip((rank, 2 * size - 1 - rank), query.chunk(2, dim=-2), strict=True)
    ]
    return torch.cat(attended, dim=-2)


def _as_autocast(part: Tensor) -> Tensor:
    """Return what attention would make of an argument, before it is sent: kernels chosen by the kind of mask are not cast for."""
    device = part.device.type
    casts = torch.is_autocast_enabled(device) and part.dtype != torch.float64
    return part.to(torch.get_autocast_dtype(device)) if casts else part


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it has no types in torch; dynamo cannot make the bias
def attend_to_prefix(query: Tensor, key: Tensor, value: Tensor, seen: int, scale: float | None, gqa: bool) -> Tensor:
    """Return the attention of a chunk of queries that ends at the place `seen` of the sequence: the last sees all before it."""
    bias = causal_lower_right(query.shape[-2], seen)  # a mask that kernels know by its shape
    keys, values = key[..., :seen, :], value[..., :seen, :]
    before, F.scaled_dot_product_attention = (
        F.scaled_dot_product_attention,
        _ATTENTION,
    )  # it asks for the function by name
    try:
        return _ATTENTION(query, keys, values, bias, scale=scale, enable_gqa=gqa)
    finally:
        F.scaled_dot_product_attention = before


def _in_order(parts: Tensor) -> Tensor:
    """Put the chunks of all ranks, [ranks, ..., time, width], into the order of the sequence."""
    early, late = parts.chunk(2, dim=-2)
    return torch.cat([*early, *late.unbind(0)[::-1]], dim=-2)


class _AllGather(torch.autograd.Function):
    """Every rank's part of a tensor, on every rank; backward, the sum over the ranks of the gradients of this one's part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        """Gather the parts: [...] becomes [ranks, ...]."""
        ctx.group = group
        part = part.contiguous()
        parts = part.new_empty(dist.get_world_size(group), *part.shape)
        _gather(parts.flatten(0, 1), part, group=group)
        return parts

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None]:
        """Add up the ranks' gradients of each part, and return that of one's own."""
        total = gradients.new_empty(gradients.shape[1:])
        _scatter_sums(total, gradients.contiguous().flatten(0, 1), group=ctx.group)
        return total, None


_all_gather: Any = _AllGather.apply
