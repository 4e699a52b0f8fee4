"""What a run that may go back knows of its last steps: the batches they were trained on, and whether one of them was bad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from sheer.distributed.agree import gathered
from sheer.distributed.mesh import Ranks
from sheer.errors import BadStepsError
from sheer.metrics import Number
from sheer.nonfinite import Watch, became_nonfinite

WINDOW = 50  # good losses before a step that its own is compared with
FEWEST = 10  # of them; before there are as many, no loss counts as a spike

Added = tuple[list[Number], list[Number], bool]  # totals, counts, and whether the totals are means


@dataclass(frozen=True, slots=True)
class Trained:
    """Which batches of the loader a step was trained on."""

    epoch: int
    first: int
    last: int
    ends_epoch: bool


class Trail:
    """The steps since the last check. Adding one does not wait for the device.

    Args:
        spike: how many times the median of the losses before it a loss may be; None: losses are not compared.
    """

    def __init__(self, spike: float | None) -> None:
        self.spike = spike
        self.places: dict[int, Trained] = {}  # of each step
        self._losses: list[tuple[int, Added]] = []
        self._is_checked = False

    def add(self, step: int, place: Trained, loss: Added | None) -> None:
        """Note a step, and what `Metrics.added_in_step` says of its loss, where losses are compared."""
        if self._is_checked:
            self.places.clear()
            self._is_checked = False
        self.places[step] = place
        if loss is not None:
            self._losses.append((step, loss))

    def check(self, watch: Watch, ranks: Ranks | None, before: list[float]) -> None:
        """Wait for the device, and look for the first bad step that was added since the last check, by any rank.

        `before` are the losses of the last good steps; those of the steps that are found to be good are added to it.

        Raises:
            BadStepsError: there is one. What a NaN leads to says nothing of the steps behind it, so it is bad alone; of losses that
                spike, those that follow without a gap are bad, too.
        """
        found = watch.first_bad(ranks)
        sums, self._losses = losses_of_steps(self._losses, ranks), []
        self._is_checked = True
        if self.spike is not None:
            self._find_spike([one for one in sums if found is None or one[0] < found[0]], self.spike, before)
        if found is not None:
            step, what = found
            raise BadStepsError(
                became_nonfinite(step, what), f"the {what} became NaN or infinite at step {step:,}", step, step
            )

    def _find_spike(self, sums: Sequence[tuple[int, float]], spike: float, before: list[float]) -> None:
        """Compare the losses of steps, one after the other, with those before them."""
        for index, (step, loss) in enumerate(sums):
            limit = limit_of(before, spike)
            if loss > limit:
                row = [other for other, value in sums[index:] if value > limit]
                last = next(step + n for n in range(len(row)) if step + n + 1 not in row)
                raise BadStepsError(
                    f"The loss spiked at step {step}: it was {loss:.4g}, and {limit:.4g} is the limit, spike={spike:g} times the median of the good "
                    f"losses before it, {median(before):.4g}.",
                    f"the loss spiked at step {step:,}",
                    step,
                    last,
                )
            before.append(loss)
            del before[:-WINDOW]

    def clear(self) -> None:
        """Forget all steps."""
        self.places.clear()
        self._losses.clear()


def limit_of(before: Sequence[float], spike: float) -> float:
    """Return the largest loss that is no spike: m + (spike - 1) * max(|m|, d).

    m is the median of the losses before it and d the median of |loss - m|. Where no loss is below 0, d is at most m, and the limit is
    spike * m. Where some are, a share of m alone would say nothing.
    """
    if len(before) < FEWEST:
        return math.inf
    middle = median(before)
    size = max(abs(middle), median(abs(loss - middle) for loss in before))
    return middle + (spike - 1) * size if size > 0 else math.inf


def losses_of_steps(losses: Sequence[tuple[int, Added]], ranks: Ranks | None) -> list[tuple[int, float]]:
    """Return the loss of each step, over all its parts and all ranks; one in which nothing counted has none."""
    numbers = iter(on_host([number for _, (totals, counts, _) in losses for number in (*totals, *counts)]))
    own: dict[int, tuple[float, float]] = {}
    for step, (totals, counts, are_means) in losses:
        read, weights = [next(numbers) for _ in totals], [next(numbers) for _ in counts]
        if are_means:
            read = [value * weight for value, weight in zip(read, weights, strict=True)]
        own[step] = sum(read), sum(weights)
    told = [own] if ranks is None else gathered(own if ranks.reports else {})
    summed_up = []
    for step in sorted({step for one in told for step in one}):
        parts = [one[step] for one in told if step in one]
        count = sum(part[1] for part in parts)
        if count > 0:
            summed_up.append((step, sum(part[0] for part in parts) / count))
    return summed_up


def on_host(numbers: Sequence[Number]) -> list[float]:
    """Read numbers, of which some are on a device, in one transfer."""
    kept = [number.reshape(()) for number in numbers if isinstance(number, Tensor)]
    wide = [number.float() if number.device.type == "mps" else number.double() for number in kept]
    read = iter(torch.stack(wide).tolist() if wide else [])
    return [next(read) if isinstance(number, Tensor) else float(number) for number in numbers]
