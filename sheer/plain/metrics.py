"""Metrics and losses, kept on the device and read late."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sheer.distributed.agree import gathered
from sheer.metrics import Mean

PlainWatched = list[tuple[int, str, Tensor]]


class PlainMetrics:
    """Weighted means of what steps return. Adding does not wait for the device; reading does."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[Any, int]]] = {}

    def add(self, output: Any, samples: int, prefix: str = "") -> None:
        """Add what a step returned for a batch of `samples`."""
        for name, value in output.items() if isinstance(output, Mapping) else [("loss", output)]:
            kept = plain_kept(value)
            self.rows.setdefault(prefix + name, []).append((kept, samples))

    def read(self, ranks: None = None) -> dict[str, float]:
        """Return the means, and start anew."""
        rows, self.rows = self.rows, {}
        return {name: plain_mean(values) for name, values in rows.items()}

    def __bool__(self) -> bool:
        return bool(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Return what was added since the last reading."""
        return {name: plain_rows_state(rows) for name, rows in self.rows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.rows = {name: plain_rows(saved) for name, saved in state.items()}


def plain_kept(value: Any) -> Any:
    """Return a value in memory of its own: that of a loss may be that of all it was computed from."""
    if isinstance(value, Mean):
        return Mean(torch.as_tensor(value.total).detach().clone(), torch.as_tensor(value.count).detach().clone())
    return value.detach().clone() if isinstance(value, Tensor) else value


def plain_mean(rows: list[tuple[Any, int]]) -> float:
    """Return the mean of values, each with its weight."""
    if isinstance(rows[0][0], Mean):
        return sum(float(value.total) for value, _ in rows) / (sum(float(value.count) for value, _ in rows) or math.nan)
    return sum(float(value) * samples for value, samples in rows) / sum(samples for _, samples in rows)


def plain_sum(rows: list[tuple[Any, int]]) -> tuple[float, float]:
    """Return the sum of values, each with its weight, and that of the weights."""
    if isinstance(rows[0][0], Mean):
        return sum(float(value.total) for value, _ in rows), sum(float(value.count) for value, _ in rows)
    return sum(float(value) * samples for value, samples in rows), sum(samples for _, samples in rows)


def plain_read_on_ranks(metrics: PlainMetrics, counts: bool) -> dict[str, float]:
    """Return the means over all ranks, and start anew.

    What this one measured is added if it `counts`: others may have measured the same.
    """
    rows, metrics.rows = metrics.rows, {}
    sums: dict[str, tuple[float, float]] = {}
    for part in gathered({name: plain_sum(values) for name, values in rows.items()} if counts else {}):
        for name, (total, weight) in part.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + weight)
    return {name: total / (weight or math.nan) for name, (total, weight) in sums.items()}


def plain_rows_state(rows: list[tuple[Any, int]]) -> dict[str, Any]:
    """Return values and their weights as a checkpoint holds them."""
    is_mean = isinstance(rows[0][0], Mean)
    pairs = [(value.total, value.count) for value, _ in rows] if is_mean else rows
    return {"weighted": not is_mean, "folded": [list(torch.tensor(pairs, dtype=torch.float64).T)]}


def holds_means(saved: dict[str, Any]) -> bool:
    """Whether what was saved are means with counts of their own."""
    return not saved["weighted"]


def plain_rows(saved: dict[str, Any]) -> list[Any]:
    """Return the values that a checkpoint holds, each with its weight."""
    if holds_means(saved):
        return [(Mean(*pair), 1) for columns in saved["folded"] for pair in torch.stack(columns).T.tolist()]
    return [pair for columns in saved["folded"] for pair in torch.stack(columns).T.tolist()]


def plain_check(watched: list[tuple[int, str, Tensor]]) -> None:
    """Raise an error that names the first value since the last check that was NaN or infinite."""
    for at, what, scalar in watched:
        if not scalar.isfinite():
            raise FloatingPointError(f"The {what} became NaN or infinite at step {at}.")
    watched.clear()
