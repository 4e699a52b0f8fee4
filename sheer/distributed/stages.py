"""A model cut into the stages of a pipeline, by the names of its modules.

The convention, in one sentence: **a stage is the model with the modules of other stages missing, and its forward must pass its input
on where they are.** What that asks of a model:

- of an `nn.Sequential`, and of whatever loops over an `nn.Sequential`, `nn.ModuleList` or the values of an `nn.ModuleDict`: nothing.
  Elements of other stages are not there, and those that are keep their names ("blocks.2" stays "blocks.2").
- of a module written out in a forward: a test. Where it belongs to another stage, it is None:

      x = self.embed(x) if self.embed is not None else x
      for block in self.blocks:
          x = block(x)
      return self.head(x) if self.head is not None else x

Whatever else forward computes, it computes on every stage: on the input of the first, and on the output of the stage before on the
others. So it belongs into a module, or behind such a test; `check_stages` finds where it does not. A module through which a boundary
runs (above, the model and `blocks`) is in every stage; its own buffers too, and its own parameters in the first of them, None elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import ScheduleDualPipeV, ScheduleZBVZeroBubble
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from sheer.errors import ModelError, SettingsError
from sheer.random import random_state, set_random_state

DOWN_AND_BACK = (ScheduleZBVZeroBubble, ScheduleDualPipeV)  # the schedules that go down the ranks and back again
STAGE_HINT = (
    "A stage is the model with the modules of other stages missing, and its forward must pass its input on where they are: "
    "x = self.embed(x) if self.embed is not None else x. What the step gives the model by position goes to the first stage only; what others "
    "need too (positions, a mask) it gives by keyword."
)


def stages_of_rank(schedule: str, rank: int, size: int, number: int) -> list[int]:
    """Return which of `number` stages the rank at place `rank` of `size` holds, lowest first.

    GPipe and 1F1B have one on each rank. Interleaved1F1B, LoopedBFS and InterleavedZeroBubble deal them out in turn. ZBVZeroBubble and
    DualPipeV go down the ranks and back again, so that the last stage is on the first rank.

    Raises:
        SettingsError: there is no such schedule, or it does not fit the numbers.
    """
    try:
        kind: Any = get_schedule_class(schedule)
    except ValueError as error:
        raise SettingsError(f"{schedule!r} is no schedule of a pipeline: {error}") from None
    if issubclass(kind, DOWN_AND_BACK):
        fits, wanted, stages = number == 2 * size, f"{2 * size}, two a rank", [rank, 2 * size - 1 - rank]
    elif issubclass(kind, PipelineScheduleSingle):
        fits, wanted, stages = number == size, f"{size}, one a rank", [rank]
    else:
        fits, wanted = number > 0 and number % size == 0, f"a multiple of {size}"
        stages = list(range(rank, number, size))
    if not fits:
        raise SettingsError(
            f"The schedule {schedule} on {size} ranks needs {wanted}, and the model is cut into {number} stages. Give one split point "
            "fewer than the stages that there are to be."
        )
    return stages


def split_model(model: nn.Module, split_points: Sequence[str], stages: Sequence[int]) -> list[nn.Module]:
    """Return the stages of a model that a rank holds.

    The modules of a stage are those of the model itself, with its parameters; only what a boundary runs through is a copy. Names of
    parameters are those of the whole model, so state_dicts of all stages together are that of the model.

    Args:
        model: the whole model.
        split_points: names of modules, each of which begins a new stage: ["blocks.2", "blocks.4"] make three.
        stages: which of them are wanted.

    Raises:
        ModelError: a split point that cannot begin a stage, or a parameter that belongs to two.
    """
    shells, stage_of = _assign(model, split_points)
    _check_tied(model, shells, stage_of)
    return [_stage(model, shells, stage_of, index) for index in stages]


def copied_modules(model: nn.Module, split_points: Sequence[str]) -> list[str]:
    """Return the names of the modules, the model itself among them, that each stage has a copy of: a boundary runs through them."""
    return _assign(model, split_points)[0]


def keep_only(model: nn.Module, split_points: Sequence[str], stages: Sequence[int]) -> None:
    """Take the modules of other stages out of a model, and with them their memory; what is left has the names that it had."""
    shells, stage_of = _assign(model, split_points)
    _take_out_others(model, shells, stage_of, stages)


def _take_out_others(
    model: nn.Module, shells: Sequence[str], stage_of: Mapping[str, int], stages: Sequence[int]
) -> None:
    """Take out of a model what belongs to none of these stages."""
    for name, stage in stage_of.items():
        owner, _, own_name = name.rpartition(".")
        parent = model.get_submodule(owner)
        if stage not in stages and isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            delattr(parent, own_name)  # which keeps the names of the others, where `del parent[0]` would not
        elif stage not in stages:
            setattr(parent, own_name, None)
    for shell in shells:
        if _first_stage(shell, stage_of) not in stages:
            module = model.get_submodule(shell)
            for name, _ in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, None)


def _assign(model: nn.Module, split_points: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """Return the modules through which a boundary runs, and the stage of each module directly in them, in order."""
    shells = {""} | {point[:at] for point in split_points for at, letter in enumerate(point) if letter == "."}
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    atoms = [name for name in names if name and name not in shells and name.rpartition(".")[0] in shells]
    stage, stage_of = 0, {}
    for place, name in enumerate(atoms):
        stage += name in split_points and place > 0
        stage_of[name] = stage
    if stage != len(split_points):
        wrong = [point for point in split_points if point not in atoms[1:]] or list(split_points)
        raise ModelError(
            f"Split points {wrong} do not begin a stage. Each is the name of a module, given once, that is neither the first of the model "
            f"nor holds another split point: one of {atoms[1:]}, or of the modules in them."
        )
    return [name for name in names if name in shells], stage_of


def _first_stage(shell: str, stage_of: Mapping[str, int]) -> int:
    """Return the stage in which a module begins through which a boundary runs."""
    return min(stage for name, stage in stage_of.items() if not shell or name.startswith(f"{shell}."))


def _check_tied(model: nn.Module, shells: Sequence[str], stage_of: Mapping[str, int]) -> None:
    """See that no parameter is in two stages, where two ranks would each train their own.

    Raises:
        ModelError: there is one.
    """
    held: dict[int, tuple[str, int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((atom for atom in stage_of if name.startswith(f"{atom}.")), None)
        stage = _first_stage(name.rpartition(".")[0], stage_of) if owner is None else stage_of[owner]
        other, other_stage = held.setdefault(id(parameter), (name, stage))
        if stage != other_stage:
            raise ModelError(
                f"{other} and {name} are one parameter, in stages {other_stage} and {stage} of the pipeline, which do not share memory. Move the "
                "split points so that both are in one stage, or untie them."
            )


def _stage(model: nn.Module, shells: Sequence[str], stage_of: Mapping[str, int], index: int) -> nn.Module:
    """Return one stage: copies of the shells, around the modules themselves."""
    kept: list[Any] = [model.get_submodule(name) for name in stage_of]
    for shell in shells:
        module = model.get_submodule(shell)
        kept += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    stage = copy.deepcopy(model, {id(item): item for item in kept})
    _take_out_others(stage, shells, stage_of, [index])
    return stage


@torch.no_grad()
def check_stages(
    model: nn.Module, split_points: Sequence[str], arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> None:
    """Run the model, and its stages one after the other, on the same arguments, in eval mode; nothing of the model changes.

    For one process that holds the whole model. Costs two forwards.

    Raises:
        ModelError: the stages do not give what the model gives, or one cannot run.
    """
    state, training = random_state(), [module for module in model.modules() if module.training]
    model.eval()
    try:
        wanted = model(*arguments, **keywords)
        given: Any = arguments
        for index, stage in enumerate(split_model(model, split_points, range(len(split_points) + 1))):
            try:
                given = stage.eval()(*given, **keywords)
            except Exception as error:
                raise ModelError(f"Stage {index} of the model cannot run: {error!r}. {STAGE_HINT}") from error
            given = given if isinstance(given, tuple) else (given,)
    finally:
        for module in training:
            module.training = True
        set_random_state(state)
    for one, other in zip(wanted if isinstance(wanted, tuple) else (wanted,), given, strict=True):
        if isinstance(one, Tensor) and (one.shape != other.shape or not torch.allclose(one, other, equal_nan=True)):
            raise ModelError(
                "The stages of the model, one after the other, do not compute what the model computes: its forward does something outside of the "
                "modules that are cut apart, and does it on every stage. Put it into a module, or behind `if self.<module> is not None`."
            )
