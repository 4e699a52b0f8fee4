"""Trying the stages of a pipeline and the user's step before the first step, so that all ranks know what is sent, or refuse together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sheer.data.batch import move
from sheer.distributed.stages import STAGE_HINT, check_stages
from sheer.distributed.stand_in import ModelCall, answered
from sheer.distributed.steps import let_go
from sheer.errors import ModelError, SheerError, StepError
from sheer.loss import Step
from sheer.random import random_state, set_random_state


@dataclass(frozen=True)
class Sketch:
    """What goes into a stage or comes out of it: tensors on the meta device, and whether they are handed over as a tuple."""

    tensors: tuple[Tensor, ...]
    several: bool

    def zeros(self, device: torch.device) -> Any:
        """Return such tensors, of zeros, as the stage would give them."""
        made = tuple(torch.zeros_like(one, device=device).requires_grad_(one.requires_grad) for one in self.tensors)
        return made if self.several else made[0]


def try_stages(
    stages: Mapping[int, nn.Module],
    rank_of: Mapping[int, int],
    group: ProcessGroup,
    device: torch.device,
    autocast: AbstractContextManager[Any],
    call: ModelCall,
) -> list[Sketch]:
    """Run each stage once, and return what goes into the first and comes out of each. All ranks of the pipeline must call it.

    Args:
        stages: those of this rank, by their index.
        rank_of: for each stage of the model, its rank in the group.
        group: the ranks of the pipeline.
        device: where this rank computes.
        autocast: entered around each stage.
        call: what the model is called with.

    Raises:
        ModelError: a stage cannot run, on all ranks.
    """
    sketches = [Sketch(tuple(torch.empty_like(argument, device="meta") for argument in call.arguments), several=True)]
    for index in range(len(rank_of)):
        told: list[Any] = [None]
        failed = None
        if index in stages:
            taken = [torch.zeros_like(one, device=device) for one in sketches[-1].tensors]
            taken = list(call.arguments) if index == 0 else taken
            needs = any(one.requires_grad for one in (*sketches[-1].tensors, *stages[index].parameters()))
            try:
                told = [_try_stage(stages[index], taken, call.keywords, autocast, index == len(rank_of) - 1)]
                told = [
                    ([(shape, dtype, needs and dtype.is_floating_point) for shape, dtype in told[0][0]], told[0][1])
                ]
            except Exception as error:
                told, failed = [repr(error)], error
        dist.broadcast_object_list(told, group=group, group_src=rank_of[index])
        if isinstance(told[0], str):
            raise ModelError(f"Stage {index} of the model cannot run: {told[0]}. {STAGE_HINT}") from failed
        outputs = (torch.empty(shape, dtype=dtype, device="meta", requires_grad=r) for shape, dtype, r in told[0][0])
        sketches.append(Sketch(tuple(outputs), several=told[0][1]))
    return sketches


def _try_stage(
    module: nn.Module,
    taken: list[Tensor],
    keywords: Mapping[str, Any],
    autocast: AbstractContextManager[Any],
    last: bool,
) -> tuple[list[tuple[tuple[int, ...], torch.dtype]], bool]:
    """Run a stage without a trace; return shape and type of its outputs, and whether they are several.

    Raises:
        ModelError: it returns what cannot be sent.
    """
    state, buffers = random_state(), [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.no_grad(), autocast:
            given = module(*taken, **keywords)
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        let_go(module)
        set_random_state(state)
    outputs = given if isinstance(given, (tuple, list)) else (given,)
    if not all(isinstance(one, Tensor) and (last or one.is_floating_point()) for one in outputs):
        raise ModelError(
            f"it must return a tensor or a tuple of tensors, floating where they are sent on, not {given!r:.200}"
        )
    return [(tuple(one.shape), one.dtype) for one in outputs], given is outputs


def misuse_in(
    step_function: Step, batch: Any, more: tuple[Any, ...], training: bool, sketch: Sketch, device: torch.device
) -> str | None:
    """Run a step on an output of zeros, and return what is wrong with how it uses the model, if anything."""
    try:
        answered(step_function, batch, more, training, sketch.zeros(device))
    except StepError as error:
        return str(error)
    except Exception:
        return None  # it is of zeros, or real, and then the rank of the last stage raises it
    return None


def what_differs(uncut: nn.Module | None, split_points: Sequence[str], call: ModelCall) -> str | None:
    """Return how the stages of a model compute something else than the model, as `check_stages` says it; None where they do not.

    Args:
        uncut: the model before it was cut; None: another rank looks.
        split_points: the names of the modules at which it was cut.
        call: what it is called with.
    """
    if uncut is None:
        return None
    home = next(uncut.parameters()).device
    arguments, keywords = move((call.arguments, call.keywords), home)
    try:
        check_stages(uncut, split_points, arguments, keywords)
    except ModelError as error:
        return str(error)
    except Exception:
        return None  # the model cannot run where it is, such as one for GPUs alone on the host
    return None


def refuse_together(misuse: str | None, group: ProcessGroup, kind: type[SheerError] = StepError) -> None:
    """Raise what any rank found wrong, on all of them, so that none waits for the others.

    Raises:
        SheerError: one found something; of the kind that is given.
    """
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, misuse, group=group)
    for found in told:
        if found is not None:
            raise kind(found)
