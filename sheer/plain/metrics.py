"""Metrics and losses, kept on the device and read late."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sheer.metrics import Mean, Number


class PlainMetrics:
    """Weighted means of what steps return. Adding does not wait for the device; reading does."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[Any, Number]]] = {}

    def add(self, output: Any, samples: int, prefix: str = "") -> None:
        """Add what a step returned for a batch of `samples`."""
        for name, value in output.items() if isinstance(output, Mapping) else [("loss", output)]:
            if isinstance(value, Mean):
                row = Mean(detached(value.total), 1), detached(value.count)
            else:
                row = detached(value), samples
            self.rows.setdefault(prefix + name, []).append(row)

    def read(self) -> dict[str, float]:
        """Return the means, and start anew."""
        means = {}
        for name, rows in self.rows.items():
            total = weight = 0.0
            for value, count in rows:
                if isinstance(value, Mean):
                    total += float(value.total)
                else:
                    total += float(value) * float(count)
                weight += float(count)
            means[name] = total / weight if weight else float("nan")
        self.rows.clear()
        return means

    def __bool__(self) -> bool:
        return bool(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Return what was added since the last reading."""
        return {name: state_of_rows(rows) for name, rows in self.rows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for name, saved in state.items():
            self.rows[name] = []
            for totals, counts in saved["folded"]:
                for total, count in zip(totals.tolist(), counts.tolist(), strict=True):
                    self.rows[name].append((total if saved["weighted"] else Mean(total, 1), count))


def detached(value: Any) -> Any:
    """Return a value to be kept, in memory of its own: that of a loss may be that of all it was computed from."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def state_of_rows(rows: list[tuple[Any, Number]]) -> dict[str, Any]:
    """Return values and their weights as a checkpoint holds them."""
    totals = [float(value.total) if isinstance(value, Mean) else float(value) for value, _ in rows]
    counts = [float(count) for _, count in rows]
    folded = [torch.tensor(totals, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)]
    return {"weighted": not isinstance(rows[0][0], Mean), "folded": [folded]}


class PlainWatch:
    """Losses and norms on the device, tested together."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, Tensor]] = []

    def add(self, step: int, what: str, value: Tensor) -> None:
        """Keep a scalar to be tested."""
        self.seen.append((step, what, value.detach().reshape(()).clone()))

    def check(self) -> None:
        """Raise an error that names the first value since the last check that was NaN or infinite."""
        seen, self.seen = self.seen, []
        for step, what, value in seen:
            if not value.isfinite():
                raise FloatingPointError(f"The {what} became NaN or infinite at step {step}.")
