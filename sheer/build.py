"""From what a user passes to what a run needs: device, precision, optimizer, scheduler. Wrong things are refused here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sheer.distributed.world import own_device
from sheer.errors import ModelError, SettingsError, StepError
from sheer.evaluation import Compute
from sheer.initialise import materialise
from sheer.settings import Precision

TRUE_DTYPES: dict[Precision, torch.dtype] = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
MIXED_DTYPES: dict[Precision, torch.dtype] = {
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "float8-mixed": torch.bfloat16,  # around the layers that compute in float8
}


def resolve_device(name: str) -> torch.device:
    """Return the device that a setting means.

    Raises:
        SettingsError: there is no such device on this machine.
    """
    if name == "auto":
        return own_device(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    check_device(name)
    return own_device(torch.device(name))


def check_device(name: str) -> None:
    """Raise `SettingsError` for what is no name of a device, and for a device that is not on this machine."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(
            f'device={name!r} is no name of a device. torch names them "cuda" (a GPU of NVIDIA or AMD; "cuda:1" is the second), "mps", "cpu". '
            f"Leave device out to take the accelerator that is there (there is {what_is_here()})."
        ) from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"device={name!r} cannot be used on this machine (there is {what_is_here()}): {reason}"
        ) from error


def what_is_here() -> str:
    """Return the accelerator of this machine, as an error names it."""
    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu only")


def make_compute(precision: Precision, device: torch.device) -> Compute:
    """Return where and in which precision steps are computed."""
    return Compute(device, autocast_of(precision, device), TRUE_DTYPES.get(precision))


def autocast_of(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which steps are computed."""
    mixed = MIXED_DTYPES.get(precision)
    return torch.autocast(device.type, dtype=mixed) if mixed is not None else nullcontext()


def place_model(model: nn.Module, compute: Compute) -> None:
    """Move a model to the device, and to the precision, that its steps are computed in; in place. One on the meta device is initialised."""
    materialise(model, compute.device)
    model.to(compute.device)
    if compute.dtype is not None:
        model.to(compute.dtype)


def takes_step_number(step: Callable[..., Any], name: str = "step", model: nn.Module | None = None) -> bool:
    """Whether a step function is to be given the number of the step: it has a third parameter, and its name is `step`.

    Raises:
        StepError: it is no function of (model, batch).
    """
    if isinstance(step, nn.Module):
        raise StepError(
            f"{name} must be a function of (model, batch), and a {type(step).__name__} was given. If it is the model, write "
            "def step(model, batch): ... and return the loss."
        )
    if not callable(step):
        raise StepError(f"{name} must be a function of (model, batch), not {step!r}.")
    if model is not None and getattr(step, "__self__", None) is model:
        method = getattr(step, "__qualname__", "the method")
        raise StepError(
            f"{name} is a method of the model itself, so its `self` is taken and the model would be its batch. Pass it unbound, as {method}."
        )
    try:
        parameters = list(inspect.signature(step).parameters.values())
    except ValueError:  # built in, so it does not tell
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variable = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    needed = [p for p in positional if p.default is p.empty]
    if len(positional) > 2 and positional[2].name == "step":
        return True
    if not variable and (len(positional) < 2 or len(needed) > 2):
        shape = ", ".join(p.name for p in parameters)
        own = " Its `self` is taken: pass the method unbound, as Net.training_step." if inspect.ismethod(step) else ""
        raise StepError(
            f"{name} is called with (model, batch), and {getattr(step, '__qualname__', step)}({shape}) takes other arguments.{own} "
            "A third parameter, if it is called `step`, gets the number of the step."
        )
    return False


def build_optimizer(model: nn.Module, optimizer: Optimizer | Callable[[nn.Module], Optimizer]) -> Optimizer:
    """Return the optimizer, made now if a function was given.

    Raises:
        ModelError: it is no optimizer.
    """
    built = optimizer
    if isinstance(optimizer, str):
        raise ModelError(
            f"optimizer is the string {optimizer!r}. Give PyTorch's own object: torch.optim.AdamW(model.parameters(), lr=1e-3), say."
        )
    if isinstance(optimizer, type):
        raise ModelError(
            f"optimizer is the class {optimizer.__name__}. Give an object, or a function such as lambda model: {optimizer.__name__}(model.parameters(), lr=...)."
        )
    if not isinstance(optimizer, Optimizer) and callable(optimizer):
        check_arguments(optimizer, "optimizer", ("model",))
        built = optimizer(model)
    if not isinstance(built, Optimizer):
        raise ModelError(
            f"optimizer must be a torch.optim.Optimizer or a function of the model that returns one, not a {type(built).__name__}."
        )
    return built


def refuse_closure(optimizer: Optimizer) -> None:
    """Raise `ModelError` for an optimizer that computes the loss itself, several times a step, as LBFGS does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ModelError(
            f"{type(optimizer).__name__} computes the loss several times in one step, which fit does not. In a loop of your own "
            "(for batch in run.steps(loader): ...) call optimizer.step(closure) yourself."
        )


def check_arguments(function: Callable[..., Any], name: str, arguments: tuple[str, ...]) -> None:
    """Raise `ModelError` if a function cannot be called with as many arguments."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # built in, so it does not tell
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        own = getattr(function, "__qualname__", type(function).__name__)
        raise ModelError(
            f"{name} is called as {name}({', '.join(arguments)}), and {own}{signature} cannot be. Write lambda {', '.join(arguments)}: ..."
        ) from error


def parameters_of(model: nn.Module, optimizers: Mapping[str, Optimizer]) -> dict[Optimizer, list[nn.Parameter]]:
    """Return what each optimizer updates, in the model's order; a single one updates all that is trained."""
    return {
        optimizer: list(model.parameters()) if len(optimizers) == 1 else held_by(optimizer, model)
        for optimizer in optimizers.values()
    }


def held_by(optimizer: Optimizer, model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model that an optimizer updates, in the model's order."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [parameter for parameter in model.parameters() if id(parameter) in held]


def check_parameters(model: nn.Module, optimizers: Mapping[str, Optimizer]) -> None:
    """See that the optimizers update what is to be trained, and nothing else.

    Raises:
        ModelError: an optimizer holds parameters that the model does not have, or a trainable parameter is in no optimizer.
    """
    own = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in own.items()}
    updated: set[int] = set()
    for label, optimizer in optimizers.items():
        held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        strangers = [p for key, p in held.items() if key not in names]
        which = f"The optimizer {label!r}" if len(optimizers) > 1 else "The optimizer"
        if strangers and len(strangers) == len(held):
            raise ModelError(
                f"{which} holds none of the model's parameters: training would change nothing. Was it built for another model, or before the "
                "model was copied or converted? Build it from this model's parameters(), or pass a function: optimizer=lambda model: ..."
            )
        if strangers:
            shapes = ", ".join(str(list(p.shape)) for p in strangers[:3])
            raise ModelError(
                f"{which} holds {len(strangers)} parameters that the model does not have (shapes {shapes}). They would be neither saved nor "
                "moved to the device. Put them into one nn.Module with the model."
            )
        updated |= held.keys()
    left = [name for name, p in own.items() if p.requires_grad and id(p) not in updated]
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        raise ModelError(
            f"No optimizer holds {shown}: {'it' if len(left) == 1 else 'they'} would never be trained. Add "
            f"{'it' if len(left) == 1 else 'them'} to the optimizer, or freeze with requires_grad_(False)."
        )
    if not any(p.requires_grad for p in own.values()):
        raise ModelError("The model has no parameter with requires_grad: there is nothing to train.")


def built_by_function(scheduler: Any) -> bool:
    """Whether a scheduler is made by a function of (optimizer, total steps), rather than an object already."""
    return not hasattr(scheduler, "step") and callable(scheduler)


def build_scheduler(scheduler: Any, optimizer: Optimizer, total_steps: int | None) -> Any:
    """Return the scheduler, made now if a function of (optimizer, total steps) was given.

    Raises:
        ModelError: it is no scheduler, or belongs to another optimizer.
        SettingsError: it needs the number of steps, and that is not known.
    """
    if scheduler is None:
        return None
    built = scheduler
    if isinstance(scheduler, str):
        raise ModelError(
            f"scheduler is the string {scheduler!r}. Give sheer.warmup_cosine(warmup_steps=...), warmup_linear or warmup_stable_decay, a "
            "scheduler of torch.optim.lr_scheduler, or a function of (optimizer, total_steps)."
        )
    if isinstance(scheduler, type):
        raise ModelError(
            f"scheduler is the class {scheduler.__name__}. Give an object, or a function of (optimizer, total_steps)."
        )
    if built_by_function(scheduler):
        if total_steps is None:
            raise SettingsError(
                "The scheduler is a function of the total number of steps, and that is not known: the loader has no length, or only max_time "
                "is given. Give max_steps, or a scheduler object."
            )
        check_arguments(scheduler, "scheduler", ("optimizer", "total_steps"))
        built = scheduler(optimizer, total_steps)
    if not (hasattr(built, "step") and hasattr(built, "state_dict") and hasattr(built, "load_state_dict")):
        raise ModelError(
            f"scheduler must have step, state_dict and load_state_dict, as those of torch.optim.lr_scheduler, or be a function of (optimizer, "
            f"total_steps) that returns one; a {type(built).__name__} has not."
        )
    if getattr(built, "optimizer", optimizer) is not optimizer:
        raise ModelError(
            "The scheduler was built on another optimizer, so it would change nothing. Build it on the one that trains, or pass a function."
        )
    return built
