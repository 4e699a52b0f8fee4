"""When a step runs out of the device's memory: it is done again in smaller micro-batches. The global batch stays."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from sheer.data.batch import StepBatch, micro_batches
from sheer.distributed.agree import gathered
from sheer.errors import DataError, SheerWarning, user_level
from sheer.loss import Step
from sheer.random import set_generators
from sheer.run import Run
from sheer.settings import Settings

LEFT = (
    'Not one sample fits. What is left: precision="bf16-mixed", torch.utils.checkpoint in the model, shorter samples, an optimizer with less '
    'state, or parallel="fsdp" on several devices.'
)


def train_again(
    cfg: Settings,
    run: Run,
    train_on: Callable[..., Any],
    step_function: Step,
    numbered: bool,
    batch: StepBatch,
    error: torch.OutOfMemoryError,
) -> None:
    """Do a step again that ran out of memory, from the same random states (but on the CPU), in micro-batches half as large; halve them until it fits.

    `error` is what it ran out with. The size is kept for the steps that follow, and saved.

    Raises:
        torch.OutOfMemoryError: one sample does not fit, or the step cannot be done again; a note says which, and what to do.
    """
    failed: torch.OutOfMemoryError | None = error
    while failed is not None:
        make_room(cfg, run, batch, failed)
        failed = None
        try:
            train_on(cfg, run, step_function, numbered, smaller_parts(batch, run.progress.micro_batch_size))
        except torch.OutOfMemoryError as again:
            failed = again


def smaller_parts(batch: StepBatch, size: int | None) -> StepBatch:
    """Return what a step trains on, in micro-batches of at most `size` samples."""
    return batch if size is None else batch.holding(micro_batches(batch, size))


def make_room(cfg: Settings, run: Run, batch: StepBatch, error: torch.OutOfMemoryError) -> None:
    """Halve the micro-batches, and take back what a step did that ran out of memory."""
    limits = [size for size in (cfg.micro_batch_size, run.progress.micro_batch_size) if size is not None]
    size = min([max(samples for _, samples in batch), *limits])
    smaller = -(-size // 2)
    why = refusal_of(run, batch, size, smaller, error)
    if why is not None:
        error.add_note(why)
        raise error
    if run.progress.micro_batch_size is None:
        warn_of_traces(run)
    run.progress.micro_batch_size = smaller

    traceback.clear_frames(error.__traceback__)  # they hold what was computed
    for parameter in run.model.parameters():
        parameter.grad = None
    run.metrics.forget_step()
    if run.graphs is not None:
        run.graphs.captured = {}  # they are of larger parts, and hold memory
    if run.rewind is not None:
        set_generators(run.rewind.generators, run.rewind.states)
    if run.compute.device.type != "cpu":
        torch.accelerator.empty_cache()
    in_all = sum(samples for _, samples in batch) if run.ranks is None else batch.total
    run.console.say(
        f"out of memory at step {run.progress.step:,}: micro-batches of {smaller} instead of {size} from here on; the global batch stays {in_all}"
    )


def refusal_of(run: Run, batch: StepBatch, size: int, smaller: int, error: torch.OutOfMemoryError) -> str | None:
    """Return why a step cannot be done again; None: it can."""
    if size <= 1:
        return LEFT
    if run.ranks is not None and run.graphs is not None and run.graphless is None:
        return (
            f"Ranks capture their graphs together, so one of them cannot take smaller parts alone. Set micro_batch_size={smaller}: the same step in "
            "smaller parts."
        )
    if run.ranks is not None and not is_alone_so_far(run, error):
        return (
            f"The other ranks wait for what this one was to send, so the step cannot be done again here. Set micro_batch_size={smaller}: the same "
            "step in smaller parts. (Under DDP a step is done again where nothing was sent yet: not in the backward pass of its last micro-batch, "
            "and not with buffers in the model, which are sent in each forward pass.)"
        )
    try:
        for _ in micro_batches(batch, smaller):
            pass
    except DataError as reason:
        return str(reason)
    return None


def is_alone_so_far(run: Run, error: torch.OutOfMemoryError) -> bool:
    """Whether this rank has sent nothing in the step that failed, so that the others see no more of it than that it takes longer.

    DDP sends gradients during the backward pass of the last micro-batch alone. One that was left in its middle cannot be begun anew: its
    reducer still waits for gradients, and would send those of the next micro-batch.
    """
    from torch.nn.parallel import DistributedDataParallel

    if not isinstance(run.stepper, DistributedDataParallel) or next(run.model.buffers(), None) is not None:
        return False
    passed = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return not run.stepper.require_backward_grad_sync or "torch.autograd" not in passed


def agree_on_parts(run: Run) -> None:
    """Let all ranks take the smallest micro-batches that any of them has come to. Called where they wait for each other anyway."""
    if run.ranks is None or not run.ranks.uses_ddp:
        return
    sizes = gathered(run.progress.micro_batch_size)
    smallest = min((size for size in sizes if size is not None), default=None)
    if smallest != run.progress.micro_batch_size or sizes.count(smallest) < len(sizes):
        run.progress.micro_batch_size = smallest
        which = ", ".join(str(rank) for rank, size in enumerate(sizes) if size == smallest)
        run.console.say(f"rank {which} ran out of memory: micro-batches of {smallest} on all ranks from here on")


def warn_of_traces(run: Run) -> None:
    """Warn of what the failed pass leaves behind, and of what depends on the size of micro-batches."""
    said = []
    if any(isinstance(module, _BatchNorm) for module in run.model.modules()):
        said.append(
            "The model has batch norms: their statistics are over smaller micro-batches from here on, and have seen some samples of this step twice."
        )
    if run.metrics.objects():
        names = ", ".join(sorted({type(metric).__name__ for metric in run.metrics.objects()}))
        said.append(
            f"Metric objects ({names}) may have seen some samples of this step twice, up to the next log point."
        )
    for warning in said:
        warnings.warn(
            f"Step {run.progress.step} ran out of memory and is done again. {warning}",
            SheerWarning,
            stacklevel=user_level(),
        )
