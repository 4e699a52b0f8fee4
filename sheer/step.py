"""One step: forward and backward over its micro-batches; then clip, update, and move the schedule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from sheer.data.batch import StepBatch, micro_batches
from sheer.distributed.gradients import clip_to, clip_values_to, global_norm, mean_over_ranks
from sheer.distributed.layers import Pipeline
from sheer.distributed.sequence import sharing_sequences
from sheer.distributed.steps import parts_of_rank, step_on_ranks, synchronised_last, weightless
from sheer.errors import NonFiniteError, SheerWarning, StepError, user_level
from sheer.loss import Step, loss_in, no_loss
from sheer.metrics import Mean, Number, contents, detached_number
from sheer.run import Run
from sheer.settings import Rollback, Settings

MAX_SKIPPED = 100  # steps in a row that `nonfinite="skip"` may leave out
_TINY = 1e-12  # stands for a count of 0, so that a batch in which nothing counts gives a gradient of 0


def backward(cfg: Settings, run: Run, step_function: Step, numbered: bool, batch: StepBatch, prefix: str = "") -> Any:
    """Run a step forward and backward over the micro-batches of one step, and add what it returns to the metrics.

    The gradient is sum(weight x mean) / sum(weights). A scalar loss is the mean over its micro-batch and weighs by its samples,
    which are known beforehand. The weights of `Mean`s are on the device: their sum divides the gradients once, behind the last.
    `numbered` says that the step takes the step's number.

    Returns:
        What the step returned for the last micro-batch.
    """
    parts = batch if cfg.micro_batch_size is None else list(micro_batches(batch, cfg.micro_batch_size))
    counts: list[Number] = []
    if run.stepper is not None and run.ranks is not None:  # whose gradients are averaged over ranks
        total, alone = batch.total / run.ranks.data_ranks, False
        parts = parts_of_rank(batch, parts, cfg.micro_batch_size)
    else:
        total, alone = parts[0][1] if len(parts) == 1 else sum([samples for _, samples in parts]), len(parts) == 1
    for part, samples in parts if run.stepper is None else synchronised_last(run.stepper, parts):
        held = contents(run.metrics.objects()) if run.stepper is not None and samples == 0 else []
        with run.compute.autocast:
            if run.stepper is not None:
                output = step_on_ranks(run.stepper, step_function, numbered, part, run.progress.step)
                if samples == 0:  # it was run for the other ranks' sake
                    run.metrics.take_back(output, held, prefix)
                    output = weightless(output)
            elif numbered:
                output = step_function(run.model, part, run.progress.step)
            else:
                output = step_function(run.model, part)
        loss = output if isinstance(output, (Tensor, Mean)) else loss_in(step_function, output)
        if isinstance(loss, Mean) and alone:
            loss = loss.total / nonzero(loss.count)
        elif isinstance(loss, Mean):
            counts.append(loss.count)
            loss = loss.total / total
        elif not alone and samples != total and isinstance(loss, Tensor):
            loss = loss * (samples / total)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise StepError(no_loss(step_function, output))
        if run.scaler is not None:
            run.scaler.scale(loss).backward()
        else:
            loss.backward()
        if cfg.nonfinite in ("skip", "ignore"):
            run.metrics.add(output, samples, prefix)
        else:
            kept = detached_number(loss)
            run.watch.add(run.progress.step, "loss", kept)
            run.metrics.add(output, samples, prefix, loss, kept)
    if counts:
        count = sum(counts) if run.ranks is None else mean_over_ranks(sum(counts), run.ranks)
        scale_gradients(run, total / nonzero(count))
    return output


def backward_over_sequences(
    cfg: Settings, run: Run, step_function: Step, numbered: bool, batch: StepBatch, prefix: str = ""
) -> Any:
    """Run a step forward and backward where each rank holds a part of every sequence."""
    assert run.ranks is not None
    with sharing_sequences(run.model, run.ranks, [part for part, _ in batch]):
        return backward(cfg, run, step_function, numbered, batch, prefix)


def backward_through_stages(
    cfg: Settings, run: Run, step_function: Step, numbered: bool, batch: StepBatch, prefix: str = ""
) -> Any:
    """Run a step forward and backward where each rank holds some of the layers."""
    pipeline = run.stepper
    assert isinstance(pipeline, Pipeline) and run.ranks is not None
    with sharing_sequences(run.model, run.ranks, [part for part, _ in batch]):
        output, factor = pipeline.backward(
            step_function,
            batch,
            cfg.micro_batch_size,
            run.progress.step,
            (run.progress.step,) if numbered else (),
            run.metrics,
            run.watch if cfg.nonfinite not in ("skip", "ignore") else None,
            prefix,
        )
    if factor is not None:
        scale_gradients(run, factor)
    return output


def backward_of(run: Run) -> Callable[..., Any]:
    """Return how a step of this run goes forward and backward."""
    if run.ranks is None:
        return backward
    if run.ranks.parallel.pp > 1:
        return backward_through_stages
    return backward if run.ranks.parallel.cp == 1 else backward_over_sequences


def apply(cfg: Settings, run: Run, optimizer: Optimizer, scheduler: Any = None) -> None:
    """Clip the gradients of `optimizer`, update its parameters, clear the gradients, and move `scheduler`."""
    if optimizer in run.unused:
        check_first_gradients(run, optimizer)
    if run.scaler is not None:
        run.scaler.unscale_(optimizer)
    for callback in run.events.gradients:
        callback.on_gradients(run.progress.step, run.model)

    if cfg.gradient_clip_val is not None or cfg.nonfinite not in ("raise", "ignore"):
        parameters = run.parameters[optimizer]
        if cfg.gradient_clip_algorithm == "norm" or cfg.nonfinite not in ("raise", "ignore"):
            norm = norm_of(run, parameters)
        if isinstance(cfg.nonfinite, Rollback) and run.scaler is None:  # so that the bad step is named exactly
            run.watch.add(run.progress.step, "gradient norm", norm)
        if cfg.gradient_clip_val is not None and cfg.gradient_clip_algorithm == "norm":
            clip_norm(cfg, run, parameters, cfg.gradient_clip_val, norm)
        if cfg.gradient_clip_val is not None and cfg.gradient_clip_algorithm == "value":
            clip_values(cfg.gradient_clip_val, run, parameters)

    if run.scaler is not None:
        run.scaler.step(optimizer)
        run.scaler.update()
        before = run.progress.scale
        run.progress.scale = run.scaler.get_scale()  # waits for the device: the one flag a step
        taken = run.progress.scale >= before
    elif cfg.nonfinite == "skip":
        taken = math.isfinite(norm)  # waits for the device: the one flag a step
        if taken:
            optimizer.step()
    else:
        optimizer.step()
        taken = True
    optimizer.zero_grad()
    if not taken:
        count_skipped(run, run.progress.step)
    elif scheduler is not None and cfg.scheduler_interval == "step":
        scheduler.step()
    if taken:
        for updated in run.events.update:
            updated.on_update(run.progress.step, run.model)


def norm_of(run: Run, parameters: list[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients of some parameters."""
    if run.ranks is None:
        return get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return global_norm([parameter.grad for parameter in parameters if parameter.grad is not None], run.ranks)


def clip_norm(cfg: Settings, run: Run, parameters: list[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Scale gradients whose norm is `norm` down to the largest that is allowed."""
    if run.ranks is None:
        clip_grads_with_norm_(parameters, largest, norm)
    else:
        clip_to(parameters, largest, norm)
    if cfg.nonfinite == "raise" and run.scaler is None:  # a scaler makes infinities, and deals with them
        run.watch.add(run.progress.step, "gradient norm", norm)


def clip_values(bound: float, run: Run, parameters: list[nn.Parameter]) -> None:
    """Bring each number of the gradients between -bound and bound."""
    if run.ranks is None:
        clip_grad_value_(parameters, bound)
    else:
        clip_values_to(parameters, bound)


def check_first_gradients(run: Run, optimizer: Optimizer) -> None:
    """See that the first backward of an optimizer has reached its parameters.

    Raises:
        StepError: it reached none of them.
    """
    run.unused.remove(optimizer)
    held = {id(parameter) for parameter in run.parameters[optimizer]}
    trained = {n: p for n, p in run.model.named_parameters() if id(p) in held and p.requires_grad}
    left = [name for name, parameter in trained.items() if parameter.grad is None]
    if left and len(left) == len(trained):
        raise StepError(
            f"The loss of step {run.progress.step} gave no gradient to any of the optimizer's {len(left)} parameters ({left[0]}, ...), so nothing "
            "would be trained. Most likely the step does not use the `model` that it is given, but another, or a copy of it. Compute the loss "
            "with that argument; to compile it, set compile=True."
        )
    if left:
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        warnings.warn(
            f"The loss of step {run.progress.step} gave no gradient to {shown}: no update changes {'it' if len(left) == 1 else 'them'} unless a later "
            "loss depends on it. Where that is meant, freeze with requires_grad_(False).",
            SheerWarning,
            stacklevel=user_level(),
        )


def nonzero(count: Number) -> Number:
    """Return a count to divide by; a count of 0 comes with a total of 0, and the mean is to be 0."""
    return count.clamp(min=_TINY) if isinstance(count, Tensor) else max(count, _TINY)


def scale_gradients(run: Run, factor: Number) -> None:
    """Multiply all gradients of the model."""
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def count_skipped(run: Run, step: int) -> None:
    """Count a step whose update was left out.

    Raises:
        NonFiniteError: there were too many in a row, so the run is not going anywhere.
    """
    progress = run.progress
    if progress.last_skipped == step:  # by another optimizer of the same step
        return
    progress.skipped += 1
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if progress.last_skipped == step - 1 else 1
    progress.last_skipped = step
    if progress.skipped_in_a_row >= MAX_SKIPPED:
        raise NonFiniteError(
            f"The gradients were NaN or infinite in {MAX_SKIPPED} steps in a row, up to step {step}, and every update was left out. "
            "Lower the learning rate, look at the batches of these steps, or find the operation with detect_anomaly=True."
        )
