"""What operations do, seen one by one: the memory that is in use, and the bytes that ranks would send."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sheer.distributed.tensors import local
from sheer.scripts import standing_in

ALL = "all ranks"


@dataclass(frozen=True, order=True)
class Traffic:
    """What the collectives of one kind, over the ranks of one dimension of the mesh, move in a step."""

    dimension: str
    kind: str  # all-gather, reduce-scatter, all-reduce, broadcast, ...
    ranks: int  # that take part
    calls: int = 0
    size: int = 0  # bytes of the whole tensors: what is gathered, what is reduced

    @property
    def sent(self) -> int:
        """Bytes that each rank sends, by the ring algorithm."""
        part = {"all-reduce": 2 * (self.ranks - 1) / self.ranks, "broadcast": 1.0}.get(self.kind)
        return round(self.size * ((self.ranks - 1) / self.ranks if part is None else part))


KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "broadcast", "scatter", "gather", "reduce")


def kind_of(operator: str) -> str | None:
    """Return which kind of collective an operator of PyTorch is, `c10d::_allgather_base_` say; None: it waits for one, or is none."""
    name = operator.split("::")[1].replace("_", "")
    return next((kind for kind in KINDS if name.startswith(kind.replace("-", ""))), None)


class Ledger(TorchDispatchMode):
    """Keeps account while it is entered: of the memory of tensors, real or fake, and of collectives.

    Memory is that of storages: from the operation that makes one, or `hold`, until nothing refers to it. What one operation uses inside
    of itself, and what allocators round up, is not seen.

    Args:
        dimensions: the name of each process group's dimension, and how many ranks it has, by the group's name.
        also: called at each new most, to keep what the memory is then made of.

    Attributes:
        now: bytes in use.
        most: the most that were, since `restart`.
        kept: what `also` returned at that moment.
    """

    def __init__(
        self, dimensions: Mapping[str, tuple[str, int]] | None = None, also: Callable[[], int] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dimensions, self.also = dict(dimensions or {}), also
        self.now, self.most, self.kept = 0, 0, 0
        self._sizes: dict[int, int] = {}
        self._moved: dict[tuple[str, str], Traffic] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation; what is done to a divided tensor comes back here as what is done to this rank's part."""
        if any(issubclass(kind, torch.Tensor) and kind.__name__ == "DTensor" for kind in types):
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._count(function, args, result)
        self.hold(value for value in tree_leaves(result) if isinstance(value, Tensor))
        return result

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of tensors that were made before."""
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            if id(storage) not in self._sizes:
                weakref.finalize(storage, self._freed, id(storage)).atexit = False
                self._sizes[id(storage)] = 0
            self.sized(storage)

    def sized(self, storage: torch.UntypedStorage) -> None:
        """Take note of the size that a storage has now, if it is known."""
        before = self._sizes.get(id(storage))
        if before is not None and before != storage.nbytes():
            self._sizes[id(storage)] = storage.nbytes()
            self.now += storage.nbytes() - before
            if self.now > self.most:
                self.most = self.now
                self.kept = self.also() if self.also is not None else 0

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def restart(self) -> None:
        """Forget the most, and the collectives, up to here."""
        self.most, self.kept = self.now, self.also() if self.also is not None else 0
        self._moved.clear()

    def _count(self, function: Any, args: tuple[Any, ...], result: Any) -> None:
        kind = kind_of(function._schema.name)
        if kind is None:
            return
        dimension, ranks = self.dimensions.get(group_name(args), (ALL, torch.distributed.get_world_size()))
        before = self._moved.get((dimension, kind), Traffic(dimension, kind, ranks))
        size = max(map(_bytes, (*args, result)))  # the larger of what goes in and what comes out
        self._moved[dimension, kind] = Traffic(dimension, kind, ranks, before.calls + 1, before.size + size)

    def moved(self) -> tuple[Traffic, ...]:
        """Return what collectives moved since `restart`."""
        return tuple(sorted(self._moved.values()))


def seeing_resizes(ledger: Ledger) -> AbstractContextManager[None]:
    """Let a ledger see storages that are resized in place, as `fully_shard` does to free what it gathered: no operation tells of it."""
    resize = functools.partialmethod(resize_and_tell, torch.UntypedStorage.resize_, ledger)
    return standing_in(torch.UntypedStorage, {"resize_": resize})


def resize_and_tell(storage: torch.UntypedStorage, resize: Callable[..., Any], ledger: Ledger, size: int) -> Any:
    """Stand for `UntypedStorage.resize_`."""
    result = resize(storage, size)
    ledger.sized(storage)
    return result


def group_name(args: tuple[Any, ...]) -> str:
    """Return the name of the process group among the arguments of a collective: the last string, or the group itself."""
    from torch.distributed import ProcessGroup

    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return ProcessGroup.unbox(argument).group_name
    return next((argument for argument in reversed(args) if isinstance(argument, str)), "")


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes that tensors take on this rank: of their storages, each once, what pads them counted in."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = local(tensor).untyped_storage()
            storages[id(storage)] = storage
    return sum(storage.nbytes() for storage in storages.values())


def whole_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of tensors as they would be on one rank; of a divided tensor, of all its parts."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors if tensor is not None)


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimizer's state."""
    return [value for state in optimizer.state.values() for value in tree_leaves(state) if isinstance(value, Tensor)]
