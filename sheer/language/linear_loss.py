"""The cross-entropy of a linear layer's outputs, which never exist all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sheer.distributed.tensors import is_divided_tensor
from sheer.errors import StepError
from sheer.metrics import Mean


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk_size: int = 2048,
) -> Mean:
    """Return what `F.cross_entropy(F.linear(hidden, weight, bias), targets)` is the mean of, without the logits of all tokens.

    Those of `chunk_size` tokens exist at a time, and their gradients are computed at once, so the memory for tokens x classes is
    not needed in the backward pass either. The rest is as with autocast and `F.cross_entropy`: products in autocast's dtype,
    the softmax, the loss and the sum of the weight's gradients in float32 (in float64 for float64). Forward and backward do the
    work of one forward and one backward; nothing is computed twice. A second backward through the same loss is an error.

    Args:
        hidden: what the last layer of a model is given, [..., width].
        weight: of that layer, [classes, width]; it may be shared with an embedding.
        targets: the class of each token, [...], int64.
        bias: of that layer, [classes].
        ignore_index: the target of tokens that are not counted.
        chunk_size: tokens whose logits exist at a time.

    Returns:
        The sum over all tokens that count, and their number: a step returns it as its loss.

    Raises:
        StepError: these are no tensors, the targets no whole numbers, the shapes do not fit, or the weight is divided over ranks.
    """
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor) and isinstance(targets, Tensor)):
        raise StepError(
            "linear_cross_entropy takes the tensors hidden, weight and targets, and was given a "
            f"{type(hidden).__name__}, a {type(weight).__name__} and a {type(targets).__name__}. Of a layer give layer.weight, and bias=layer.bias."
        )
    if targets.is_floating_point():
        raise StepError(
            f"linear_cross_entropy takes the class of each token, int64, and its targets are {targets.dtype}. Call targets.long() where they are whole."
        )
    if hidden.shape[:-1] != targets.shape or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise StepError(
            "linear_cross_entropy takes hidden [..., width], weight [classes, width] and targets [...], and was given "
            f"{list(hidden.shape)}, {list(weight.shape)} and {list(targets.shape)}."
        )
    if is_divided_tensor(weight):
        raise StepError(
            "linear_cross_entropy was given a weight that is divided over ranks. Under tensor parallel call the layer and F.cross_entropy; "
            "under FSDP leave the layer out of shard_modules, so that it is gathered around the whole step."
        )
    if chunk_size < 1:
        raise StepError(f"chunk_size must be at least 1, not {chunk_size}.")
    rows, classes, device = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    total = chunked_loss(rows, weight, bias, classes, ignore_index, chunk_size, dtype, torch.is_grad_enabled())
    return Mean(total, (classes != ignore_index).sum(dtype=total.dtype))


class ChunkedLoss(torch.autograd.Function):
    """The sum of the losses of all tokens, chunk by chunk, each with its gradients; the backward pass only scales those."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        chunk_size: int,
        dtype: torch.dtype,
        with_gradients: bool,
    ) -> Tensor:
        """Compute the loss, and, if they will be asked for, the gradients that a gradient of 1 leads to."""
        wide = torch.promote_types(dtype, torch.float32)
        needed = [bool(need and with_gradients) for need in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=wide) if needed[2] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        counted = targets != ignore_index
        classes = torch.where(counted, targets, 0)
        with torch.autocast(hidden.device.type, enabled=False):
            cast_weight = weight.to(dtype)
            cast_bias = bias.to(dtype) if bias is not None else None
            for start in range(0, len(hidden), chunk_size):
                part = slice(start, start + chunk_size)
                inputs, counts, own = hidden[part].to(dtype), counted[part, None], classes[part, None]
                log_p = F.log_softmax(F.linear(inputs, cast_weight, cast_bias), dim=-1, dtype=wide)
                own_log_p = log_p.gather(1, own)
                total = total - torch.where(counts, own_log_p, 0).sum()  # in place, 2.11 compiles its gradient to 0
                if not any(needed):
                    continue
                # The gradient of the logits is p - 1 at the target, p elsewhere; tokens that do not count are masked where they are few.
                gradient = log_p.exp_().scatter_(1, own, own_log_p.expm1())
                if grad_bias is not None:
                    grad_bias += counts[:, 0].to(wide) @ gradient
                gradient = gradient.to(dtype)
                del log_p  # whose memory that was
                if grad_hidden is not None:
                    grad_hidden[part] = torch.where(counts, gradient @ cast_weight, 0)
                if grad_weight is not None:
                    add_product(grad_weight, gradient.t(), torch.where(counts, inputs, 0))
                del gradient  # before the logits of the next chunk
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """Scale the gradients in place: there may be no memory for a second copy, and autograd refuses to use them twice."""
        gradients = [gradient if gradient is None else gradient.mul_(grad_outputs[0]) for gradient in ctx.saved_tensors]
        return *gradients, None, None, None, None, None


chunked_loss: Any = ChunkedLoss.apply


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to `total`, in its precision."""
    if total.device.type == "cuda" and total.dtype != left.dtype and torch.compiler.is_compiling():
        total += torch.mm(left, right, out_dtype=total.dtype)  # 2.11 cannot trace the other
    elif total.device.type == "cuda" and total.dtype != left.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
