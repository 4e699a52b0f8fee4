"""What a step adds to the metrics while it is captured, and the values that its replays have added since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sheer.metrics import Mean, Metrics
from sheer.nonfinite import Watch

MOST_KEPT = 1024  # steps whose values are kept on the device
_MOST_COLUMNS = 64


class CannotCaptureError(Exception):
    """A step cannot be captured; the message says why, as the end of a sentence."""


class Recorder:
    """Stands for the metrics of a run while its step is captured; `Watching` for the watch over its losses.

    Each replay then writes the values into a row of a table on the device, and `tell` adds the rows to the metrics.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps: list[int] = []  # that were replayed since `tell`
        self._tensors: list[Tensor] = []
        self._means: dict[
            str, list[tuple[int, int]]
        ] = {}  # by name, the columns of totals and counts; one pair for each micro-batch
        self._plain: dict[str, list[tuple[int, int]]] = {}  # by name, the columns of values and their samples
        self._watched: list[tuple[str, int]] = []
        self._skipped: int | None = None
        self._constants: dict[int, float] = {}
        # Made before the capture: what is made in one shares its memory with what the same graph needs earlier.
        self._memory = torch.empty(MOST_KEPT * _MOST_COLUMNS, dtype=torch.float64, device=device)
        self._table = self._memory
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # the next row

    def objects(self) -> list[Any]:
        """Return the metric objects that were added: none can be."""
        return []

    def add(
        self, output: Any, samples: int, prefix: str = "", loss: Tensor | None = None, kept: Tensor | None = None
    ) -> None:
        """Do as `Metrics.add`."""
        for name, value in ({"loss": output} if isinstance(output, (Tensor, Mean)) else output).items():
            if isinstance(value, Mean):
                self._means.setdefault(prefix + name, []).append((self._place(value.total), self._place(value.count)))
            elif isinstance(value, Tensor):
                self._plain.setdefault(prefix + name, []).append((self._place(value), samples))
            elif value is not None:
                raise CannotCaptureError(
                    f"the step returns {name!r} as a {type(value).__name__}, which a graph would keep as it is now; return a tensor"
                )

    def add_watched(self, what: str, value: Tensor) -> None:
        """Keep a loss or a norm that is to be finite."""
        self._watched.append((what, self._place(value)))

    def add_skipped(self, flag: Tensor) -> None:
        """Keep whether the update is left out."""
        self._skipped = self._place(flag)

    def _place(self, value: Any) -> int:
        """Return the column of a value; a number that is none of the device gets one below 0."""
        if not isinstance(value, Tensor):
            self._constants[-1 - len(self._constants)] = float(value)
            return -len(self._constants)
        if value.numel() != 1 or value.device.type != "cuda":
            raise CannotCaptureError(f"the step returns a metric of {value.numel()} values on {value.device}")
        self._tensors.append(value)
        return len(self._tensors) - 1

    def seal(self) -> None:
        """Write all values into a row of the table, as the last of what is captured."""
        same = {tensor.dtype for tensor in self._tensors} == {torch.float32}
        dtype = torch.float32 if same else torch.float64  # holds each of the others exactly
        row = torch.stack([tensor.detach().reshape(()).to(dtype) for tensor in self._tensors])
        if len(row) > _MOST_COLUMNS:
            raise CannotCaptureError(f"the step returns more than {_MOST_COLUMNS} values in its micro-batches")
        self._table = self._memory.view(dtype)[: MOST_KEPT * len(row)].view(MOST_KEPT, len(row))
        self._table.index_copy_(0, self._at, row.unsqueeze(0))
        self._at.add_(1)
        self._tensors = []

    def tell(self, metrics: Metrics, watch: Watch) -> None:
        """Add to the metrics what replays have computed since this was last called; nothing waits for the device."""
        steps, self.steps = self.steps, []
        if not steps:
            return
        table = self._table[: len(steps)].to(torch.float64, copy=True)
        self._at.zero_()
        for name, pairs in self._plain.items():
            metrics.add_column(name, _column(table, [place for place, _ in pairs]), [n for _, n in pairs] * len(steps))
        for name, places in self._means.items():
            totals, counts = ([self._values(table, pair[side]) for pair in places] for side in (0, 1))
            metrics.add_column(name, torch.stack(totals, 1).flatten(), torch.stack(counts, 1).flatten())
        if self._watched:
            seen = [(step, what) for step in steps for what, _ in self._watched]
            watch.add_column(seen, _column(table, [place for _, place in self._watched]))
        if self._skipped is not None:
            watch.add_skips(steps, table[:, self._skipped])

    def _values(self, table: Tensor, place: int) -> Tensor:
        return table[:, place] if place >= 0 else table.new_full((len(table),), self._constants[place])


class Watching:
    """Stands for the watch over the losses of a run whose step is captured."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def add(self, step: int, what: str, value: Tensor) -> None:
        """Do as `Watch.add`."""
        self.recorder.add_watched(what, value)


def _column(table: Tensor, places: list[int]) -> Tensor:
    """Return the values in some columns of a table, row by row; a list as an index would be copied to the device, and waited for."""
    return torch.stack([table[:, place] for place in places], 1).flatten()


def leaves_of(value: Any, tensors: list[Tensor], key: list[Any]) -> None:
    """Walk a batch: put its tensors into `tensors`, and into `key` what a graph depends on: shapes and types, and all that is no tensor.

    Raises:
        CannotCaptureError: it holds something that cannot be compared, or tensors that are not on the GPU.
    """
    if isinstance(value, Tensor):
        if not value.is_cuda or value.layout is not torch.strided:
            raise CannotCaptureError(f"a batch holds a tensor on {value.device} ({value.layout})")
        tensors.append(value)
        key += (value.shape, value.dtype)
    elif isinstance(value, (list, tuple)):
        key.append(len(value))
        for item in value:
            leaves_of(item, tensors, key)
    elif value is None or isinstance(value, (int, float, str, bytes)):
        key.append(value)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            key.append(name)
            leaves_of(item, tensors, key)
    else:
        raise CannotCaptureError(f"a batch holds a {type(value).__name__}")
