"""What keeps the tokens of packed documents apart in attention: a mask for each of PyTorch's ways of computing it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sheer.errors import StepError


def document_mask(documents: Tensor) -> Tensor:
    """Return which token attends to which: earlier ones of its own document, and itself. For `F.scaled_dot_product_attention`.

    It is all written out, length x length for each row, and rules out the fastest kernels: for rows of a few hundred tokens, or
    the CPU. On GPUs see `document_block_mask` and `document_offsets`.

    Args:
        documents: the document of each token, [batch, length], as `sheer.data.Packed` gives it.

    Returns:
        [batch, 1, length, length], bool, True where attention takes place: for heads in the second dimension.

    Raises:
        StepError: `documents` is not [batch, length].
    """
    check_rows("document_mask", "documents", documents)
    length = documents.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & earlier)[:, None]


def document_block_mask(documents: Tensor) -> Any:
    """Return the same for `torch.nn.attention.flex_attention.flex_attention`, which leaves out blocks where nothing attends.

    Both want to be compiled: `torch.compile(flex_attention)`, and for rows of many thousand tokens `torch.compile(document_block_mask)`.

    Args:
        documents: the document of each token, [batch, length], as `sheer.data.Packed` gives it.

    Returns:
        A `BlockMask` over [batch, any number of heads, length, length].

    Raises:
        StepError: `documents` is not [batch, length].
    """
    check_rows("document_block_mask", "documents", documents)
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = documents.shape
    attends = functools.partial(attends_within, documents)
    return create_block_mask(attends, batch, None, length, length, device=str(documents.device))


def attends_within(documents: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether a query attends to a key, by their places in a row: FlexAttention's `mask_mod` with the documents put first."""
    return (query >= key) & (documents[batch, query] == documents[batch, key])


def document_offsets(starts: Tensor, length: int) -> Tensor:
    """Return where documents begin among all tokens of a batch, for attention of variable length.

    The number of offsets is the same for each batch, and nothing waits for the device: rows with fewer documents than others have
    documents of no token at their end. `torch.nn.attention.varlen.varlen_attn(q, k, v, offsets, offsets, length, length,
    window_size=(-1, 0))` takes them, with q, k and v of [batch x length, heads, head size].

    Args:
        starts: where documents begin in each row, [batch, most documents], int32, as `sheer.data.Packed` gives it.
        length: tokens in a row.

    Returns:
        [batch x most documents + 1], int32, from 0 to batch x length.

    Raises:
        StepError: `starts` is not [batch, most documents].
    """
    check_rows("document_offsets", "starts", starts)
    rows = torch.arange(0, len(starts) * length, length, dtype=torch.int32, device=starts.device)
    end = torch.full((1,), len(starts) * length, dtype=torch.int32, device=starts.device)
    return torch.cat([(starts + rows[:, None]).flatten(), end])


def check_rows(function: str, name: str, given: Tensor) -> None:
    """Raise `StepError` for a tensor that does not hold one row for each of a batch."""
    if given.dim() != 2:
        raise StepError(
            f"{function} takes `{name}` of a whole batch, two dimensions, as a loader over sheer.data.Packed yields them, and not the shape "
            f"{list(given.shape)}. (One row alone is {name}[None].)"
        )
