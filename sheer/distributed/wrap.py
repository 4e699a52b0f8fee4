"""How a model is divided over ranks, by PyTorch's own means: tensor plans, `fully_shard`, `DistributedDataParallel`."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sheer.compilation import compile_model
from sheer.data.order import mix_seed
from sheer.distributed.agree import from_rank_zero, gathered
from sheer.distributed.given import check_averaged, check_given, has_parts, is_divided
from sheer.distributed.mesh import Ranks
from sheer.distributed.tensors import is_divided_tensor
from sheer.errors import ModelError, SettingsError
from sheer.float8 import refuse_float8_layers_in_parts
from sheer.initialise import children_first, convert_own, initialise, materialise
from sheer.random import seed_process
from sheer.settings import Parallel, Precision

Parallelize = Mapping[str, Any] | Callable[..., Any] | None


@dataclass(frozen=True)
class Sharding:
    """How a model is sharded."""

    plan: Mapping[str, Any]  # styles of layers that tensor ranks share, by the names of modules
    units: Sequence[nn.Module] | None  # what is sharded by itself; None: as the settings say
    dtype: torch.dtype | None  # what parameters are converted to, if anything
    precision: Precision  # what they are computed in where the settings do not say
    compile_mode: bool | str  # whether and how the units are compiled


class StepModule(nn.Module):
    """A module whose forward is a step: what DDP and `fully_shard` go around, so that the step gets the very model that was passed.

    All methods of the model work in the step, its gradients are always synchronised, and its names stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, step_function: Callable[..., Any], batch: Any, *number: int) -> Any:
        """Run a step function on the model."""
        return step_function(self.model, batch, *number)


def divide(
    model: nn.Module,
    ranks: Ranks,
    parallelize: Parallelize,
    dtype: torch.dtype | None,
    precision: Precision,
    compile_mode: bool | str,
    optimizers: int,
    autocast: AbstractContextManager[Any],
) -> nn.Module:
    """Divide a model over the ranks, in place, and return the module that runs its steps.

    Args:
        model: on the host or the meta device; on return this rank's part of it is on its device.
        ranks: how it is divided.
        parallelize: a plan of PyTorch's `ParallelStyle`s by the names of modules, or a function of (model, mesh) that divides the model
            itself, and may return the modules that `fully_shard` is to get each by itself.
        dtype: what its parameters are converted to, if anything.
        precision: what sharded parameters are computed in where the settings do not say.
        compile_mode: whether and how the modules that are sharded by themselves are compiled.
        optimizers: how many there are; with several, a step need not reach every parameter.
        autocast: what steps are computed in.

    Raises:
        ModelError, SettingsError: it cannot be divided so.
    """
    if has_parts(model):
        check_given(model, ranks, parallelize)
    units: Iterable[nn.Module] | None = None
    plan = {} if parallelize is None or callable(parallelize) else dict(parallelize)
    if precision == "float8-mixed":
        refuse_float8_layers_in_parts(ranks.parallel.tp, ranks.parallel.pp)
    check_plan(model, ranks, plan, parallelize)
    if dtype is not None and (callable(parallelize) or not any(p.is_meta for p in model.parameters())):
        model.to(dtype)  # what is still to be initialised draws its numbers first
    if callable(parallelize):
        units = parallelize(model, ranks.model_mesh)
    if is_divided(model):
        check_averaged(model, ranks)
        return StepModule(model)
    if ranks.uses_ddp:
        return with_ddp(model, ranks, dtype, ranks.parallel.find_unused_parameters or optimizers > 1)
    same_on_all_ranks(model)
    sharding = Sharding(plan, list(units) if units is not None else None, dtype, precision, compile_mode)
    if ranks.parallel.pp > 1:
        from sheer.distributed.layers import make_pipeline

        return make_pipeline(model, ranks, sharding, autocast)
    stepper = StepModule(model)
    shard(model, stepper, ranks, sharding)
    return stepper


def stepper_of(model: nn.Module, ranks: Ranks | None) -> nn.Module | None:
    """Return what runs the steps of an evaluation of a model that its user divided; None where each rank has all of it.

    Raises:
        ModelError: it is divided over other ranks than those of the run.
    """
    if ranks is None or not has_parts(model):
        return None
    check_given(model, ranks, None)
    return StepModule(model)


def count_sharded(stepper: nn.Module | None) -> int:
    """Return how many modules of a model are sharded each by itself."""
    from torch.distributed.fsdp import FSDPModule

    modules = stepper.modules() if stepper is not None else ()
    return sum(isinstance(module, FSDPModule) and module is not stepper for module in modules)


def stepped_model(stepper: nn.Module) -> nn.Module | None:
    """Return the model whose steps a module runs."""
    return next((module.model for module in stepper.modules() if isinstance(module, StepModule)), None)


def with_ddp(model: nn.Module, ranks: Ranks, dtype: torch.dtype | None, find_unused: bool) -> nn.Module:
    """Wrap a model that each rank holds as a whole; the weights of rank 0 become those of all."""
    from torch.nn.parallel import DistributedDataParallel

    materialise(model, ranks.device)
    model.to(ranks.device)
    if dtype is not None:
        model.to(dtype)
    on_accelerator = ranks.device.type != "cpu"
    # With cp each rank has the positions of its own part in them. Named only then: torch 2.13 warns of the name.
    options: dict[str, Any] = {} if ranks.parallel.cp == 1 else {"broadcast_buffers": False}
    return DistributedDataParallel(
        StepModule(model),
        device_ids=[ranks.device.index] if on_accelerator else None,
        find_unused_parameters=find_unused,
        gradient_as_bucket_view=True,
        **options,
    )


def shard(model: nn.Module, root: nn.Module, ranks: Ranks, sharding: Sharding) -> None:
    """Shard a model's parameters over ranks: each unit gathers its own when it runs, what is left those of `root`, the module that is called."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    parallel, precision, compile_mode = ranks.parallel, sharding.precision, sharding.compile_mode
    policy = MixedPrecisionPolicy(
        param_dtype=dtype_named(parallel.param_dtype)
        or {"bf16-mixed": torch.bfloat16, "float8-mixed": torch.bfloat16}.get(precision),
        reduce_dtype=dtype_named(parallel.reduce_dtype)
        or (torch.float32 if precision in ("bf16-mixed", "float8-mixed") else None),
        cast_forward_inputs=not precision.endswith("-mixed"),  # autocast does, and knows what must not be
    )
    refuse_narrow_norms(model, policy.param_dtype)
    pinned = ranks.device.type != "cpu"  # memory is pinned for an accelerator
    offload = CPUOffloadPolicy(pin_memory=pinned) if parallel.cpu_offload else OffloadPolicy()
    chosen = {id(unit) for unit in (units_of(model, parallel) if sharding.units is None else sharding.units)}
    mesh, names = ranks.sharding_mesh(), {id(module): name for name, module in model.named_modules()}
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in children_first(model):
        initialise(module, ranks.device, made)
        convert_own(module, sharding.dtype)
        apply_plan(module, names[id(module)], ranks, sharding.plan)
        if id(module) not in chosen:
            continue
        if compile_mode:
            compile_unit(module, compile_mode)
        if mesh is not None:
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=parallel.reshard_after_forward,
                mp_policy=policy,
                offload_policy=offload,
            )
    if compile_mode and not chosen:
        compile_unit(model, compile_mode)
    if mesh is not None:
        fully_shard(root, mesh=mesh, mp_policy=policy, offload_policy=offload)
    else:
        root.to(ranks.device)


def compile_unit(module: nn.Module, compile_mode: bool | str) -> None:
    """Compile a part of a divided model, as `compile` says."""
    compile_model(module, None if compile_mode in (True, "blocks") else str(compile_mode))


def refuse_narrow_norms(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Raise `SettingsError` for batch norms whose weights would be gathered in another type than their statistics have."""
    for name, module in model.named_modules():
        statistics = module.running_mean if isinstance(module, _BatchNorm) else None
        if statistics is not None and dtype is not None and statistics.dtype != dtype:
            raise SettingsError(
                f"{name} is a batch norm with statistics in {statistics.dtype}, and its weights would be gathered in {dtype}, which PyTorch does not "
                'compute with. Set Parallel(param_dtype="float32"): autocast still computes in 16 bits what can be.'
            )


def dtype_named(name: str | None) -> torch.dtype | None:
    """Return the dtype of a setting."""
    return None if name is None else getattr(torch, name)


def units_of(model: nn.Module, parallel: Parallel) -> list[nn.Module]:
    """Return the modules that are sharded each by itself.

    Raises:
        SettingsError: `shard_modules` names a class that no module has.
    """
    if parallel.shard_modules is not None:
        classes = {type(module).__name__ for module in model.modules()}
        for name in parallel.shard_modules:
            if name not in classes:
                raise SettingsError(
                    f"shard_modules names {name}, and the model has no module of that class; it has {', '.join(sorted(classes))}."
                )
        return [
            module
            for module in model.modules()
            if type(module).__name__ in parallel.shard_modules and module is not model
        ]
    if parallel.shard_min_parameters is not None:
        return large_modules(model, parallel.shard_min_parameters)
    return repeated_blocks(model)


def large_modules(model: nn.Module, least: int) -> list[nn.Module]:
    """Return the smallest modules that hold at least so many parameters not in a smaller one already."""
    chosen: list[nn.Module] = []
    taken: set[int] = set()
    for module in children_first(model):
        left = [parameter for parameter in module.parameters() if id(parameter) not in taken]
        if module is not model and sum(parameter.numel() for parameter in left) >= least:
            chosen.append(module)
            taken |= {id(parameter) for parameter in left}
    return chosen


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the members of the model's lists and sequences of modules, the outermost ones, that come several times."""
    blocks: list[nn.Module] = []
    left = [model]
    while left:
        module = left.pop(0)
        members = [child for child in module.children() if next(child.parameters(), None) is not None]
        classes = [type(child) for child in members]
        repeated = [child for child in members if isinstance(module, CONTAINERS) and classes.count(type(child)) > 1]
        blocks += repeated
        left += [child for child in members if child not in repeated]
    return blocks


CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def same_on_all_ranks(model: nn.Module) -> None:
    """Make the weights and buffers of rank 0 those of all ranks; where all were built from one seed, nothing is sent.

    Raises:
        ModelError: the ranks built different models.
    """
    import torch.distributed as dist

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}
    real = [tensor.detach() for tensor in tensors.values() if not tensor.is_meta and not is_divided_tensor(tensor)]
    marks = gathered((shapes, [checksums(tensor) for tensor in real]))
    for rank, (others, _) in enumerate(marks):
        if others != marks[0][0]:
            odd = sorted(name for name in {**others, **marks[0][0]} if others.get(name) != marks[0][0].get(name))
            raise ModelError(f"Rank {rank} built another model than rank 0; they differ in {', '.join(odd[:5])}.")
    for index, tensor in enumerate(real):
        if any(own[index] != marks[0][1][index] for _, own in marks):
            dist.broadcast(tensor, 0)


def checksums(tensor: Tensor) -> tuple[float, float]:
    """Return two numbers by which tensors of the same shape are told apart."""
    flat = tensor.reshape(-1).to(torch.float64)
    weights = torch.arange(1, flat.numel() + 1, device=flat.device, dtype=torch.float64)
    return (float(flat.sum()), float(flat @ weights)) if flat.numel() else (0.0, 0.0)


def check_plan(model: nn.Module, ranks: Ranks, plan: Mapping[str, Any], parallelize: Parallelize) -> None:
    """Raise an error where there are tensor ranks and no plan, or a plan names what the model has not."""
    if ranks.parallel.tp > 1 and parallelize is None and not has_parts(model):
        raise SettingsError(
            f"tp={ranks.parallel.tp} divides layers by a plan, and fit was given none. Pass parallelize={{'blocks.*.up': ColwiseParallel(), ...}}, "
            "or a function of (model, mesh)."
        )
    if plan and ranks.parallel.tp == 1:
        return
    names = [name for name, _ in model.named_modules()]
    for pattern in plan:
        if not any(is_meant(pattern, name) for name in names):
            raise ModelError(
                f"The plan names {pattern!r}, and the model has no such module. It has {', '.join(names[1:8])}, ..."
            )


def is_meant(pattern: str, name: str) -> bool:
    """Whether a pattern such as "blocks.*.up" means a module: a star stands for one part of the name."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def apply_plan(module: nn.Module, name: str, ranks: Ranks, plan: Mapping[str, Any]) -> None:
    """Divide a module over the tensor ranks, if the plan names it."""
    from torch.distributed.tensor.parallel import parallelize_module

    for pattern, style in plan.items():
        if ranks.parallel.tp > 1 and is_meant(pattern, name):
            parallelize_module(module, ranks.model_mesh["tp"], style)


def repoint(optimizers: Mapping[str, Any], before: Mapping[int, str], model: nn.Module) -> None:
    """Point optimizers that were built before the model was divided at the parameters that it has now, by their names.

    Raises:
        ModelError: it has a state already, or holds what the model had not.
    """
    now = dict(model.named_parameters())
    advice = "Pass a function instead: optimizer=lambda model: AdamW(model.parameters(), ...)."
    for optimizer in optimizers.values():
        if not isinstance(optimizer, torch.optim.Optimizer):
            continue
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if all(now.get(before.get(id(parameter), "")) is parameter for parameter in held):
            continue
        if optimizer.state:
            raise ModelError(
                f"The optimizer has made steps, and the model, being divided, got new parameters. {advice}"
            )
        for group in optimizer.param_groups:
            names = [before.get(id(parameter)) for parameter in group["params"]]
            if None in names:
                raise ModelError(f"The optimizer holds parameters that cannot be found in the divided model. {advice}")
            group["params"][:] = [now[name] for name in names if name in now]


def differ_in_random_numbers(ranks: Ranks) -> None:
    """Give ranks that compute on other samples, or other layers, random numbers of their own; tensor ranks draw the same."""
    seed = from_rank_zero(torch.initial_seed())
    if ranks.stream > 0:
        seed_process(mix_seed(seed, ranks.stream))
