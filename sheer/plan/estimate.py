"""What one rank of a run would hold and send: its step, run once on tensors without memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sheer.build import build_optimizer, check_parameters, make_compute, parameters_of, takes_step_number
from sheer.console import silent_console
from sheer.data.batch import StepBatch, describe, micro_batches, tensors_in
from sheer.distributed.given import is_divided
from sheer.distributed.mesh import Ranks, form_ranks
from sheer.distributed.tensors import is_divided_tensor
from sheer.distributed.wrap import Sharding, StepModule, check_plan, repoint, shard
from sheer.errors import SettingsError, StepError
from sheer.evaluation import Compute
from sheer.events import RunInfo, events_of
from sheer.loggers.base import Loggers
from sheer.plan.buckets import with_ddp_on_paper
from sheer.plan.fakes import NEEDS_VALUES, fake_mode, fake_parameters, fake_ranks, faked, is_fake
from sheer.plan.ledger import Ledger, Traffic, seeing_resizes, state_tensors, storage_bytes, whole_bytes
from sheer.progress import Progress
from sheer.random import state_before
from sheer.run import Run
from sheer.saving import saver_of
from sheer.scripts import Call, as_main, run_to_fit
from sheer.settings import Settings
from sheer.start import training_data
from sheer.step import apply, backward


@dataclass(frozen=True)
class Held:
    """Bytes that a training holds from step to step, and its gradients."""

    parameters: int
    buffers: int
    gradients: int
    optimizer: int  # its state


@dataclass(frozen=True)
class Estimate:
    """What one rank needs, in bytes."""

    rank: int
    world_size: int
    settings: Settings
    samples: int  # of a step, those of all ranks
    data_ranks: int  # that share them
    micro_batch: str  # what one forward pass of this rank gets
    micro_batches: int  # of a step
    batch: int  # what this rank gets for a step
    whole: Held  # of the model as one rank would hold it
    held: Held  # of this rank
    activations: int  # the most that forward and backward use besides
    updating: int  # the most that clipping and the optimizer use besides
    peak: int  # the most of a step, all together
    traffic: tuple[Traffic, ...]


def estimate_script(
    script: Path, arguments: Sequence[str], changes: dict[str, str], world_size: int, rank: int = 0
) -> Estimate:
    """Run a script up to `fit`, and say what a rank of so many needs for its steps.

    Args:
        script: the file.
        arguments: its own.
        changes: settings of its trainer, as text by name.
        world_size: how many ranks there are.
        rank: which of them. What does not divide is divided so that rank 0 has the most.

    Raises:
        SheerError: it cannot be planned; the message says why.
    """
    mode = fake_mode()
    with fake_ranks(world_size, rank), as_main(script, arguments):
        with fake_parameters(mode):
            call = run_to_fit(script, {**changes, "device": "cpu"}, "plan")
        return estimate(call, mode)


def estimate(call: Call, mode: Any) -> Estimate:
    """Say what this rank needs for the steps of a call of `fit`. Its parameters become fakes of `mode`, its settings those of a CPU.

    Raises:
        SheerError: it cannot be planned; the message says why.
    """
    refuse_unplanned(call)
    compute = make_compute(call.settings.precision, torch.device("cpu"))
    ranks = form_ranks(call.settings.parallel, compute.device)
    data = training_data(call.settings, compute, ranks, call.loader)
    batch = next(data.steps(Progress()))
    data.source.close()
    fake_model(call, mode, compute.dtype)
    undivided = (whole_bytes(call.model.parameters()), whole_bytes(call.model.buffers()))
    ledger = Ledger(dimensions_of(ranks))
    ledger.hold([*call.model.parameters(), *call.model.buffers()])
    with seeing_resizes(ledger), ledger:
        run = made_run(call, compute, ranks, mode)
    with seeing_resizes(ledger), mode, ledger:
        on_device = [mode.from_tensor(part) for part in tensors_in(list(batch)) if isinstance(part, Tensor)]
        ledger.hold(on_device)  # which the mode gives again wherever the step uses them
        make_state(run)
        return run_step(call, run, batch, ledger, undivided)


def refuse_unplanned(call: Call) -> None:
    """Raise `SettingsError` for what cannot be planned."""
    parallel = call.settings.parallel
    if isinstance(parallel, str):
        return
    for name, why in (
        ("pp", "the stages of a pipeline need each other's outputs"),
        ("cp", "the ranks of a sequence need each other's keys and values"),
    ):
        if getattr(parallel, name) > 1:
            raise SettingsError(
                f"sheer plan cannot plan {name}={getattr(parallel, name)}: {why}, and there is one rank only. Leave {name} out "
                f"(--parallel {name}=1) to see what the other dimensions give."
            )
    if parallel.cpu_offload:
        raise SettingsError(
            "sheer plan cannot plan cpu_offload=True: it does not tell the host's memory from the device's. Plan without it "
            "(--parallel cpu_offload=False); parameters, gradients and optimizer state are then what the host holds."
        )


def fake_model(call: Call, mode: Any, dtype: torch.dtype | None) -> None:
    """Make what a model still has of real tensors fakes, all floating ones of `dtype` if one is given, also where the optimizer holds them."""
    made: dict[int, nn.Parameter] = {}
    for module in call.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            wanted = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
            if not is_fake(parameter) or parameter.device.type != "cpu" or parameter.dtype != wanted:
                if id(parameter) not in made:
                    made[id(parameter)] = faked(parameter, mode, wanted)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                wanted = dtype if dtype is not None and buffer.is_floating_point() else buffer.dtype
                with mode:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu", dtype=wanted)
    if isinstance(call.optimizer, Optimizer):
        for group in call.optimizer.param_groups:
            group["params"][:] = [made.get(id(parameter), parameter) for parameter in group["params"]]


def dimensions_of(ranks: Ranks | None) -> dict[str, tuple[str, int]]:
    """Return the name and size of each dimension of the mesh that has several ranks, by its process group's name."""
    if ranks is None:
        return {}
    sizes = {name: ranks.mesh[name].size() for name in ranks.mesh.mesh_dim_names or ()}
    wide = {name: size for name, size in sizes.items() if size > 1}
    found: dict[str, tuple[str, int]] = {
        ranks.mesh.get_group(name).group_name: (name, size) for name, size in wide.items()
    }
    if len(wide) == 1:  # then it is all ranks, whose own group DDP uses
        everyone: Any = torch.distributed.group.WORLD
        found[everyone.group_name] = next(iter(wide.items()))
    return found


def made_run(call: Call, compute: Compute, ranks: Ranks | None, mode: Any) -> Run:
    """Make a run out of a call of `fit`, its model divided over the ranks, that has no folder and tells nobody."""
    model, optimizer = call.model, call.optimizer
    before = {id(parameter): name for name, parameter in model.named_parameters()}
    stepper = divided_on_paper(call, ranks, mode) if ranks is not None else None
    repoint({"optimizer": optimizer}, before, model)
    built = {"optimizer": build_optimizer(model, optimizer)}
    check_parameters(model, built)
    model.train()
    info = RunInfo("", Path(), compute.device, 0, None, None, 1, None, "min", {}, {}, ranks)
    return Run(
        model=model,
        optimizers=built,
        schedulers={},
        plateaus={},
        scaler=None,
        compute=compute,
        ranks=ranks,
        agreement=None,
        stepper=stepper,
        parameters=parameters_of(model, built),
        unused=set(built.values()),
        events=events_of(()),
        callbacks={},
        averaging=None,
        loggers=Loggers([]),
        console=silent_console(),
        saver=saver_of(call.settings, Path(), compute.device, ranks),
        rewind=state_before(compute.device),
        info=info,
        record={},
        total_steps=None,
        scheduled_steps=None,
    )


def divided_on_paper(call: Call, ranks: Ranks, mode: Any) -> nn.Module:
    """Divide a model over the ranks as `divide` does, but for what needs the values of its weights."""
    model, parallelize = call.model, call.parallelize
    plan = {} if parallelize is None or callable(parallelize) else dict(parallelize)
    check_plan(model, ranks, plan, parallelize)
    units = parallelize(model, ranks.model_mesh) if callable(parallelize) else None
    stepper = StepModule(model)
    if is_divided(model):
        return stepper
    if ranks.uses_ddp:
        with mode:  # its reducer makes the buckets from nothing
            return with_ddp_on_paper(stepper)
    shard(
        model,
        stepper,
        ranks,
        Sharding(plan, list(units) if units is not None else None, None, call.settings.precision, False),
    )
    return stepper


def make_state(run: Run) -> None:
    """Let the optimizers make their state, by a step without gradients."""
    for optimizer, parameters in run.parameters.items():
        for group in optimizer.param_groups:  # what is the default for such parameters on an accelerator
            if not group.get("fused") and group.get("foreach", True) is None:
                group["foreach"] = not any(is_divided_tensor(parameter) for parameter in group["params"])
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()


def run_step(call: Call, run: Run, batch: StepBatch, ledger: Ledger, undivided: tuple[int, int]) -> Estimate:
    """Run a step, and return what it needed.

    Raises:
        StepError: it needs the values of tensors.
    """
    planned, model = as_planned(call), run.model
    optimizer = next(iter(run.optimizers.values()))
    base = ledger.now  # with DDP also the gradients, whose memory it keeps
    with_buckets = run.ranks is not None and run.ranks.uses_ddp
    ledger.also = None if with_buckets else Gradients(list(model.parameters()))
    ledger.restart()
    run.progress.step = 1
    try:
        backward(planned, run, call.step, takes_step_number(call.step, model=model), batch)
    except NEEDS_VALUES as error:
        raise StepError(
            f"The step looks at the values of tensors, which a plan does not have: {str(error).splitlines()[0]}. Typical are .item(), "
            "float(tensor), `if tensor:`, and picking by a mask (x[mask]); torch.where and masked sums have no such need."
        ) from error
    most, activations = ledger.most, ledger.most - base - ledger.kept
    gradients = [parameter.grad for parameter in model.parameters()]
    own, all_of_them = storage_bytes(gradients), whole_bytes(gradients)
    begun = ledger.now
    ledger.most = begun
    del gradients
    apply(planned, run, optimizer)
    state = state_tensors(optimizer)
    parts = [
        part for part, _ in (micro_batches(batch, planned.micro_batch_size) if planned.micro_batch_size else batch)
    ]
    return Estimate(
        rank=run.ranks.rank if run.ranks is not None else 0,
        world_size=run.ranks.world_size if run.ranks is not None else 1,
        settings=call.settings,
        samples=batch.total if run.ranks is not None else sum(samples for _, samples in batch),
        data_ranks=run.ranks.data_ranks if run.ranks is not None else 1,
        micro_batch=describe(parts[0]),
        micro_batches=len(parts),
        batch=storage_bytes(part for part in tensors_in(list(batch)) if isinstance(part, Tensor)),
        whole=Held(*undivided, all_of_them, whole_bytes(state)),
        held=Held(storage_bytes(model.parameters()), storage_bytes(model.buffers()), own, storage_bytes(state)),
        activations=activations,
        updating=ledger.most - begun,
        peak=max(most, ledger.most),
        traffic=ledger.moved(),
    )


class Gradients:
    """Says how much memory the gradients of parameters have now."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def __call__(self) -> int:
        """Return the bytes of this rank."""
        return storage_bytes(parameter.grad for parameter in self.parameters)


def as_planned(call: Call) -> Settings:
    """Return the settings without what needs values: where steps of bad gradients are skipped, their norm is computed all the same."""
    given = call.settings
    clip = given.gradient_clip_val or (1.0 if given.nonfinite not in ("raise", "ignore") else None)
    return dataclasses.replace(given, nonfinite="ignore", gradient_clip_val=clip)
