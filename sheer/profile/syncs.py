"""Where a user's step makes the host wait for the device, by file and line. On the CPU: where it would, on a GPU."""

from __future__ import annotations

import sys
import sysconfig
from collections import Counter
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # its documented home

WaitingLine = tuple[str, str, int]  # what waits, in which file, in which line

READ, COPIED = "a value is read (item(), float(), if)", "a tensor is copied to the host"
MASKED = "a mask indexes"
WAITING = {
    "aten::_local_scalar_dense": READ,
    "aten::nonzero": "nonzero() counts",
    "aten::masked_select": MASKED,
    "aten::equal": "torch.equal() answers",
    "aten::_unique2": "unique() counts",
    "aten::unique_dim": "unique() counts",
    "aten::unique_consecutive": "unique_consecutive() counts",
    "aten::repeat_interleave": "repeat_interleave() counts without output_size",
}
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")
LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


class SyncFinder:
    """A context that counts, by file and line, what waits for the device.

    Args:
        device: where the run computes. On the CPU nothing waits, and everything counts that would on another device.
    """

    def __init__(self, device: torch.device) -> None:
        self.found: Counter[WaitingLine] = Counter()
        self._contexts: tuple[Any, ...] = (Operations(self.found, device),)
        if device.type == "cpu":
            self._contexts = (Copies(self.found), *self._contexts)

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for context in reversed(self._contexts):
            context.__exit__(kind, error, trace)


class Operations(TorchDispatchMode):
    """Sees the operations whose result the host must know."""

    def __init__(self, found: Counter[WaitingLine], device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found, self.device = found, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note where one is called, and run it."""
        name = func.name().split(".")[0]
        on_device = bool(args) and isinstance(args[0], Tensor) and args[0].device.type == self.device.type
        what = WAITING.get(name)
        if name == "aten::repeat_interleave" and len(args) > 1:
            what = None
        given = func(*args, **(kwargs or {}))
        if on_device and name == "aten::_to_copy" and given.device.type == "cpu" != self.device.type:
            what = COPIED
        if name in INDEXING and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1]):
            what = MASKED
        if what is not None and on_device:
            note_place(self.found, what, sys._getframe(1))
        return given


class Copies(TorchFunctionMode):
    """Sees the calls that do nothing on the CPU, and copy from any other device."""

    def __init__(self, found: Counter[WaitingLine]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note where one is called, and call it."""
        keywords = kwargs or {}
        to_host = func is Tensor.to and "cpu" in (str(one) for one in (*args[1:], *keywords.values()))
        if func in (Tensor.tolist, Tensor.cpu) or to_host:
            note_place(self.found, COPIED, sys._getframe(1))
        return func(*args, **keywords)


def note_place(found: Counter[WaitingLine], what: str, frame: FrameType | None) -> None:
    """Count a place: the innermost that is the user's own; where none is, the innermost that is not PyTorch's."""
    outside = []
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(LIBRARIES) and not file.startswith("<"):
            if not file.startswith(INSTALLED):
                found[(what, file, frame.f_lineno)] += 1
                return
            outside.append((file, frame.f_lineno))
        frame = frame.f_back
    if outside:
        found[(what, *outside[0])] += 1
