"""Losses and gradient norms that became NaN or infinite: found late, without waiting for the device, but named exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from sheer.distributed.agree import gathered
from sheer.distributed.mesh import Ranks
from sheer.errors import NonFiniteError

_MOST_WATCHED = 1024


class Watch:
    """Values on the device, each with its step, tested together when `check` is called."""

    __slots__ = ("_folded", "_new", "_seen", "_skips")

    def __init__(self) -> None:
        self._new: list[tuple[int, str, Tensor]] = []
        self._seen: list[tuple[int, str]] = []  # of those that are folded
        self._folded: list[Tensor] = []
        self._skips: list[tuple[list[int], Tensor]] = []

    def add(self, step: int, what: str, value: Tensor) -> None:
        """Keep one number to be tested, which holds nothing else in memory (see `detached_number`)."""
        self._new.append((step, what, value))
        if len(self._new) == _MOST_WATCHED:
            self._fold()

    def _fold(self) -> None:
        self._seen += [(step, what) for step, what, _ in self._new]
        scalars = [value if value.dim() == 0 else value.reshape(()) for _, _, value in self._new]
        self._folded.append(torch.isfinite(torch.stack(scalars)))
        self._new.clear()

    def add_column(self, seen: list[tuple[int, str]], values: Tensor) -> None:
        """Keep the values of many steps at once, each with its step and what it is."""
        if self._new:
            self._fold()
        self._seen += seen
        self._folded.append(torch.isfinite(values))

    def add_skips(self, steps: list[int], flags: Tensor) -> None:
        """Keep whether the device has left out the updates of some steps, to be counted."""
        self._skips.append((steps, flags))

    def take_skips(self) -> list[int]:
        """Wait for the device and return the steps whose update it has left out, since this was last asked."""
        flags = torch.cat([flags for _, flags in self._skips]).tolist() if self._skips else []
        steps = [step for steps, _ in self._skips for step in steps]
        skipped = [step for step, flag in zip(steps, flags, strict=True) if flag]
        self._skips.clear()
        return skipped

    def first_bad(self, ranks: Ranks | None) -> tuple[int, str] | None:
        """Wait for the device, and return the first step at which a value of any rank was NaN or infinite, and what it was; None: all are finite.

        What was added is forgotten.
        """
        if self._new:
            self._fold()
        finite = torch.cat(self._folded).tolist() if self._folded else []
        seen = list(self._seen)
        self._folded.clear()
        self._seen.clear()
        found = None if all(finite) else seen[finite.index(False)]
        if ranks is not None:
            found = min((other for other in gathered(found) if other is not None), default=None)
        return found

    def check(self, ranks: Ranks | None = None) -> None:
        """Wait for the device and test what was added since the last check, by any rank.

        Raises:
            NonFiniteError: a value is NaN or infinite; it names the first step at which one was.
        """
        found = self.first_bad(ranks)
        if found is not None:
            raise NonFiniteError(became_nonfinite(*found))


def became_nonfinite(step: int, what: str) -> str:
    """Say that a value was NaN or infinite, and what may help."""
    return (
        f"The {what} became NaN or infinite at step {step}. Nothing was saved since then. Usual causes: a learning rate that is too "
        "high (try gradient_clip_val=1.0 or a warm-up), a log or a division of 0, 16-bit overflow (try bf16-mixed), or a bad "
        'sample. detect_anomaly=True names the operation; nonfinite="skip" leaves such steps out, "ignore" goes on, Rollback(...) goes back.'
    )
