"""Metrics: values that steps return, kept on the device, summed by weight, read late."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sheer.distributed.agree import summed
from sheer.distributed.mesh import Ranks
from sheer.errors import StepError

Number = Tensor | float | int
_SMALL = 64  # bytes; a scalar may own far more: that of mse_loss lies in the memory of all the squares
_MOST_KEPT = 1024  # values of one metric that are kept one by one before they are stacked, to bound their number


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean and what it weighs: `total / count`.

    A step returns one for whatever is not a mean over samples, such as a loss over the tokens of padded sentences. Micro-batches,
    batches and ranks are then put together exactly: sum of totals over sum of counts.
    """

    total: Number
    count: Number


def mean(values: Tensor, mask: Tensor | None = None) -> Mean:
    """Make the `Mean` of `values`, of any shape; with a `mask` (broadcast over them, bool or weights) of those it selects."""
    if mask is None:
        return Mean(values.sum(), values.numel())
    weights = mask.expand_as(values)
    counted = weights.sum(dtype=torch.promote_types(values.dtype, torch.float32))  # 16 bits cannot count to 1,001
    return Mean((values * weights.to(values.dtype)).sum(), counted)


@runtime_checkable
class Computed(Protocol):
    """A metric object that keeps its own state, as those of torchmetrics do."""

    def compute(self) -> Any:
        """Return the value over all that was seen since the last reset."""

    def reset(self) -> None:
        """Start anew."""


class Image(NamedTuple):
    """A picture for the loggers: floats from 0 to 1 or bytes, [height, width], [channels, height, width] or [height, width, channels]."""

    data: Any


class Text(NamedTuple):
    """Words for the loggers."""

    text: str


class Figure(NamedTuple):
    """A matplotlib figure for the loggers."""

    figure: Any


Media = Image | Text | Figure


class _Sum:
    """The values of one metric since the last reading, and their weights."""

    __slots__ = ("counts", "folded", "totals", "weighted")

    def __init__(self, weighted: bool) -> None:
        self.weighted = weighted  # totals are means, to be multiplied by their counts when they are read
        self.totals: list[Number] = []
        self.counts: list[Number] = []
        self.folded: list[tuple[Tensor, Tensor]] = []

    def fold(self) -> None:
        """Stack what is kept one by one; nothing is read, so nothing waits for the device."""
        self.folded.append((_stacked(self.totals), _stacked(self.counts)))
        self.totals.clear()
        self.counts.clear()

    def drop_last(self) -> None:
        """Forget the value that was added last."""
        if self.totals:
            self.totals.pop()
            self.counts.pop()
        else:
            totals, counts = self.folded[-1]
            self.folded[-1] = totals[:-1], counts[:-1]


class Metrics:
    """What steps returned since the last reading. Adding touches no value; `read` transfers all of them at once."""

    __slots__ = ("_computed", "_held", "_media", "_sent", "_sums", "in_step")

    def __init__(self) -> None:
        self._sums: dict[str, _Sum] = {}
        self._computed: dict[str, Computed] = {}
        self._held: list[Computed] = []  # objects that a checkpoint has filled, and no step has returned since
        self._media: dict[str, Media] = {}
        self._sent: _Transfer | None = None  # what is on its way to the host
        self.in_step: list[_Sum] = []  # what the step that runs has added a value to, in order; the loop empties it

    def add(
        self, output: Any, samples: int, prefix: str = "", loss: Tensor | None = None, kept: Tensor | None = None
    ) -> None:
        """Add what a step returned for a micro-batch of `samples`: a loss, or a mapping of names to values.

        `kept` is `detached_number(loss)`, where that is at hand: a value that is this very `loss` is not detached again.

        Raises:
            StepError: a value is of a kind that cannot be a metric.
        """
        values = {"loss": output} if isinstance(output, (Tensor, Mean)) else output
        if type(values) is not dict and not isinstance(values, Mapping):
            missing = "None; is there a `return` missing?" if values is None else f"a {type(values).__name__}."
            raise StepError(f"The step returned {missing} Return a scalar tensor, or a mapping of names to metrics.")
        for name, value in values.items():
            entry = self._sums.get(prefix + name)
            if type(value) is Tensor and entry is not None and entry.weighted and value.dim() == 0:
                entry.totals.append(kept if value is loss and kept is not None else detached_number(value))
                entry.counts.append(samples)
                self.in_step.append(entry)
                if len(entry.totals) == _MOST_KEPT:
                    entry.fold()
            else:
                self._add_any(prefix + name, value, samples)

    def _add_any(self, name: str, value: object, samples: int) -> None:
        if isinstance(value, Mean):
            total, count = value.total, value.count
            entry = self._sums.setdefault(name, _Sum(weighted=False))
        elif isinstance(value, (Tensor, int, float)):
            total, count = value, samples
            entry = self._sums.setdefault(name, _Sum(weighted=True))
        elif isinstance(value, (Image, Text, Figure)):
            self._media[name] = value
            return
        elif isinstance(value, Computed):
            self._computed[name] = value
            return
        elif value is None:
            return
        else:
            raise StepError(_cannot_be_a_metric(name, value))
        if entry.weighted is isinstance(value, Mean):
            raise StepError(
                f"{name!r} was a Mean in some steps and a plain value in others; return the same kind each time."
            )
        entry.totals.append(_scalar(name, total))
        entry.counts.append(_scalar(name, count))
        self.in_step.append(entry)
        if len(entry.totals) >= _MOST_KEPT:
            entry.fold()

    def added_in_step(self, name: str) -> tuple[list[Number], list[Number], bool]:
        """Return what the step that runs has added to a metric: totals, counts, and whether the totals are means yet. Nothing is read."""
        entry = self._sums.get(name)
        if entry is None:
            return [], [], False
        number = sum([other is entry for other in self.in_step])
        totals, counts = list(entry.totals), list(entry.counts)
        for column, weights in reversed(entry.folded):
            if len(totals) < number:
                totals, counts = [*column.unbind(), *totals], [*weights.unbind(), *counts]
        return totals[len(totals) - number :], counts[len(counts) - number :], entry.weighted

    def forget_step(self) -> None:
        """Take back the values that the step that runs has added; what its metric objects saw stays."""
        for entry in reversed(self.in_step):
            entry.drop_last()
        self.in_step.clear()

    def add_column(self, name: str, totals: Tensor, counts: Tensor | list[int]) -> None:
        """Add the values of one metric of many steps at once: means with the samples that they are over, or totals with their counts."""
        weighted = isinstance(counts, list)
        entry = self._sums.setdefault(name, _Sum(weighted))
        if entry.totals:
            entry.fold()
        entry.folded.append((totals, torch.tensor(counts, dtype=torch.float64) if isinstance(counts, list) else counts))

    def send(self) -> None:
        """Begin to copy what `read` will read from a GPU: it is there when the host has waited for the GPU for another reason."""
        columns = self._columns()
        if any(column.is_cuda for column in columns):
            self._sent = _Transfer(columns)

    def read(self, ranks: Ranks | None = None) -> dict[str, float]:
        """Return the weighted means of all that was added, by all ranks, and forget it. The one place where the host waits for the device."""
        sums = {name: (sum(totals), sum(counts)) for name, (totals, counts) in self._read_columns().items()}
        if ranks is not None:
            sums = summed(ranks, sums)
        means = {name: total / (count or math.nan) for name, (total, count) in sums.items()}
        for name, metric in self._computed.items():
            means.update(_computed_values(name, metric.compute()))
            metric.reset()
        self._sums.clear()
        self._computed.clear()
        self._held.clear()
        return means

    def values(self, name: str) -> list[float]:
        """Return the single values of a metric since the last reading, oldest first (read from the device)."""
        return [total / (1.0 if entry.weighted else count) for key, entry, total, count in self._rows() if key == name]

    def take_media(self) -> dict[str, Media]:
        """Return the pictures and texts, the last of each name, and forget them."""
        media, self._media = self._media, {}
        return media

    def set_aside(self) -> list[tuple[Any, dict[str, Any]]]:
        """Empty the metric objects and return what was in them: an evaluation may use the same ones."""
        kept = contents(self.objects())
        for metric in self.objects():
            metric.reset()
        return kept

    def hold(self, metrics: Iterable[Computed]) -> None:
        """Learn of metric objects that hold values of training already, in a run that goes on."""
        self._held = list(metrics)

    def objects(self) -> list[Computed]:
        """Return the metric objects that steps returned, or a checkpoint has filled."""
        return [*self._computed.values(), *self._held]

    def take_back(self, output: Any, held: list[tuple[Any, dict[str, Any]]], prefix: str = "") -> None:
        """Undo what a step that does not count did to its metric objects, `held` before; new ones are empty, and kept to be computed."""
        put_back(held)
        known = {id(metric) for metric, _ in held}
        for name, value in output.items() if isinstance(output, Mapping) else ():
            if isinstance(value, Computed) and not isinstance(value, Tensor):
                if id(value) not in known:
                    value.reset()
                self._computed[prefix + name] = value

    def __bool__(self) -> bool:
        return bool(self._sums or self._computed)

    def _read_columns(self) -> dict[str, tuple[list[float], list[float]]]:
        columns: dict[str, tuple[list[float], list[float]]] = {}
        for name, entry, total, count in self._rows():
            totals, counts = columns.setdefault(name, ([], []))
            totals.append(total * count if entry.weighted else total)
            counts.append(count)
        return columns

    def _rows(self) -> list[tuple[str, _Sum, float, float]]:
        """Return all values with their counts on the host, in one transfer a device."""
        columns, sent = self._columns(), self._sent
        self._sent = None
        if sent is None or not sent.is_of(columns):
            sent = _Transfer(columns)
        numbers = iter(sent.arrived())
        rows = []
        for name, entry in self._sums.items():
            for _ in entry.folded:
                rows += [(name, entry, total, count) for total, count in zip(next(numbers), next(numbers), strict=True)]
        return rows

    def _columns(self) -> list[Tensor]:
        """Return all values and their counts, stacked; nothing is read."""
        for entry in self._sums.values():
            if entry.totals:
                entry.fold()
        return [tensor for entry in self._sums.values() for pair in entry.folded for tensor in pair]

    def state_dict(self) -> dict[str, Any]:
        """Return what was added since the last reading; metric objects save themselves, with the model that holds them."""
        for entry in self._sums.values():
            if entry.totals:
                entry.fold()
        return {
            name: {
                "weighted": entry.weighted,
                "folded": [[total.cpu(), count.cpu()] for total, count in entry.folded],
            }
            for name, entry in self._sums.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._sums.clear()
        for name, saved in state.items():
            entry = self._sums[name] = _Sum(saved["weighted"])
            entry.folded = [(total, count) for total, count in saved["folded"]]


def put_together(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state of metrics that hold all of what several do."""
    out: dict[str, Any] = {}
    for state in states:
        for name, saved in state.items():
            own = out.setdefault(name, {"weighted": saved["weighted"], "folded": []})
            own["folded"] = [*own["folded"], *saved["folded"]]
    return out


def contents(metrics: Iterable[Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Return metric objects, and those inside them, each with a copy of what it holds; parameters stay the same objects."""
    parts = [part for metric in metrics for part in (metric.modules() if isinstance(metric, nn.Module) else [metric])]
    modules = [part for part in parts if isinstance(part, nn.Module)]
    same = {id(one): one for module in modules for one in (module, *module.parameters(recurse=False))}
    return [(part, copy.deepcopy(vars(part), dict(same))) for part in parts if isinstance(part, Computed)]


def put_back(kept: list[tuple[Any, dict[str, Any]]]) -> None:
    """Give metric objects back what `contents` found in them."""
    for metric, content in kept:
        vars(metric).update(content)


def detached_number(value: Tensor) -> Tensor:
    """Return one number without its graph, and in a memory of its own: that of `mse_loss` lies in the memory of all the squares."""
    number = value.detach()
    return number if number.untyped_storage().nbytes() <= _SMALL else number.clone()


def _scalar(name: str, value: Number) -> Number:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise StepError(
                f"The step returned {name!r} with shape {list(value.shape)}; a metric is one number. Return its mean, or "
                "sheer.mean(values, mask) where not every value counts."
            )
        return detached_number(value).reshape(())
    return float(value)


def _stacked(values: list[Number]) -> Tensor:
    """Put single numbers into one tensor, on the device where they are."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return torch.tensor(values, dtype=torch.float64)
    device = tensors[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    if len(tensors) == len(values):
        return torch.stack(tensors).to(wide)
    return torch.stack([torch.as_tensor(value, dtype=wide, device=device) for value in values])


class _Transfer:
    """Columns of numbers on their way to the host: one copy for each device they are on. That from a GPU goes on beside what the host does."""

    def __init__(self, columns: list[Tensor]) -> None:
        self._columns = columns
        self._parts: list[tuple[list[int], Tensor]] = []
        self._copied: list[torch.cuda.Event] = []
        by_device: dict[torch.device, list[int]] = {}
        for index, column in enumerate(columns):
            by_device.setdefault(column.device, []).append(index)
        for device, indices in by_device.items():
            flat = torch.cat([columns[index] for index in indices])
            if device.type == "cuda":
                flat = torch.empty_like(flat, device="cpu", pin_memory=True).copy_(flat, non_blocking=True)
                self._copied.append(torch.cuda.Event())
                self._copied[-1].record(torch.cuda.current_stream(device))
            self._parts.append((indices, flat))

    def is_of(self, columns: list[Tensor]) -> bool:
        """Whether these very columns are sent."""
        return len(columns) == len(self._columns) and all(map(operator.is_, columns, self._columns))

    def arrived(self) -> list[list[float]]:
        """Wait until all are there, and return them."""
        for event in self._copied:
            event.synchronize()
        out: list[list[float]] = [[] for _ in self._columns]
        for indices, flat in self._parts:
            numbers, at = flat.tolist(), 0
            for index in indices:
                out[index] = numbers[at : at + len(self._columns[index])]
                at += len(self._columns[index])
        return out


def _computed_values(name: str, value: Any) -> dict[str, float]:
    """Read what a metric object computed: a number, or a mapping of numbers."""
    if isinstance(value, Mapping):
        return {
            key: item for own, part in value.items() for key, item in _computed_values(f"{name}/{own}", part).items()
        }
    if isinstance(value, Tensor) and value.numel() > 1:
        return {f"{name}/{index}": item for index, item in enumerate(value.flatten().tolist())}
    if isinstance(value, (Tensor, int, float)) and (not isinstance(value, Tensor) or value.numel() == 1):
        return {name: float(value)}
    shown = f"tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise StepError(
        f"The metric {name!r} computed a {shown}, which is no number to log. Log it yourself, or leave it out of what the step returns."
    )


def _cannot_be_a_metric(name: str, value: object) -> str:
    if isinstance(value, (tuple, list)):
        return (
            f"The step returned {name!r} as a {type(value).__name__}. A total with its count is written sheer.Mean(total, count), so "
            "that it cannot be mistaken for two metrics."
        )
    return (
        f"The step returned {name!r} as a {type(value).__name__}. A metric is a scalar tensor, a number, a sheer.Mean, an object with "
        "compute and reset, or a sheer.Image, sheer.Text or sheer.Figure."
    )
