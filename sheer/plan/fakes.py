"""Ranks and tensors that are not there: the one place that reaches behind PyTorch's public names.

PyTorch has both for its own tests and tools: a process group of any size whose collectives do nothing, and tensors that know their shape,
type and device and have no memory. TorchTitan estimates memory with the same two. Neither has a public name in torch 2.11 to 2.13;
`tests/plan/test_fakes.py` says what is needed of them.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from sheer.scripts import standing_in

_REGISTER = nn.Module.register_parameter
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
"""What an operation on fake tensors raises that needs their values."""


@contextmanager
def fake_ranks(world_size: int, rank: int) -> Iterator[None]:
    """Be one of so many ranks, the others of which are not there, while this is entered; alone where there is one.

    Collectives give no data. What ranks tell each other through the host (`sheer.distributed.agree`) each hears from itself. A script
    finds what torchrun would have told it, and may make the process group itself.
    """
    if world_size == 1:
        yield
        return
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook, before = sys.excepthook, {name: os.environ.get(name) for name in ENVIRONMENT}
    slicing, shaping = (
        functools.partialmethod(aside, method)
        for method in (DeviceMesh.__getitem__, ShardingPropagator._propagate_tensor_meta_non_cached)
    )
    talk = {"broadcast_object_list": hear_oneself, "all_gather_object": hear_oneself_from_all}
    group = {"init_process_group": group_is_there, "destroy_process_group": group_stays}
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    try:
        with (
            standing_in(dist, talk | group),
            standing_in(DeviceMesh, {"__getitem__": slicing}),
            standing_in(ShardingPropagator, {"_propagate_tensor_meta_non_cached": shaping}),
        ):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})
        dist.destroy_process_group()
        sys.excepthook = hook  # the group's own puts a rank before each line of an error


ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def group_is_there(
    backend: Any = None,
    init_method: str | None = None,
    timeout: Any = None,
    world_size: int = -1,
    rank: int = -1,
    store: Any = None,
    *,
    pg_options: Any = None,
    device_id: Any = None,
) -> None:
    """Stand for `init_process_group`."""


def group_stays(group: Any = None) -> None:
    """Stand for `destroy_process_group`."""


def hear_oneself(values: list[Any], src: int | None = None, group: Any = None) -> None:
    """Stand for `broadcast_object_list`: what rank 0 says is what this one would."""


def hear_oneself_from_all(values: list[Any], value: Any, group: Any = None) -> None:
    """Stand for `all_gather_object`: all say the same."""
    values[:] = [value] * len(values)


def aside(instance: Any, method: Any, argument: Any) -> Any:
    """Call a method with no dispatch mode on.

    A mesh is sliced by computing with tensors, and needs their values. The shapes of divided tensors are found by operations on tensors of
    their whole size, which have no memory in a real run either, and are not to be counted.
    """
    with _disable_current_modes():
        return method(instance, argument)


def fake_mode() -> FakeTensorMode:
    """Return what makes all new tensors fakes while it is entered; real ones may be mixed with them."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def fake_parameters(mode: FakeTensorMode) -> Iterator[None]:
    """Let every parameter that a module gets become a fake at once, while this is entered: a model of any size can be built.

    A script builds it under this with its data real. Memory is taken for one parameter at a time, and only touched where it is not left
    to be initialised by `torch.nn.init`, which then has fakes to work on.
    """
    known = WeakIdKeyDictionary()  # does not keep what it was made from
    with standing_in(nn.Module, {"register_parameter": functools.partialmethod(register_fake, mode, known)}):
        yield


def register_fake(
    module: nn.Module, mode: FakeTensorMode, known: Any, name: str, param: nn.Parameter | None = None
) -> None:
    """Stand for `nn.Module.register_parameter`; `known` has the fakes of parameters that other modules have, too."""
    _REGISTER(module, name, param)
    if param is None or is_fake(param) or isinstance(param, nn.parameter.UninitializedParameter):
        return
    if param not in known:
        known[param] = faked(param, mode, param.dtype)
    module._parameters[name] = known[param]


def faked(parameter: nn.Parameter, mode: FakeTensorMode, dtype: torch.dtype) -> nn.Parameter:
    """Return a parameter of the same shape on the CPU, without memory."""
    with mode:
        return nn.Parameter(torch.empty_like(parameter, device="cpu", dtype=dtype), parameter.requires_grad)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no memory."""
    return isinstance(tensor, FakeTensor)
