"""The training data of a run, as steps: batches grouped, counted, on the device, across epochs, from any position on."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sheer.data.batch import StepBatch, move
from sheer.data.order import limited
from sheer.data.shares import counted_steps, grouped_shares, with_own_sequences
from sheer.data.source import GlobalOrderSource, IterableSource, Source, Taken
from sheer.distributed.agree import gathered
from sheer.distributed.mesh import Ranks
from sheer.errors import DataError, SheerWarning, user_level
from sheer.progress import Progress
from sheer.random import random_state, set_random_state, snapshot


class TrainingData:
    """Yields what each step trains on.

    Attributes:
        batch_size: samples in a batch of the loader, where it is known.
        samples_per_epoch: in the loader, where it is known.
        steps_per_epoch: steps in one epoch, or None where only its end tells.
        yielded: what the step that runs trains on.
        at_end: whether it is the last of its epoch.
        goes_back: set by the loop in a step: `progress` was put back, and the steps are to go on from there; it puts the random states back.
    """

    def __init__(
        self,
        source: Source,
        *,
        device: torch.device,
        accumulate: int = 1,
        limit: int | float | None = None,
        same_epoch: bool = False,
        dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.source, self.device, self.dtype, self.accumulate = source, device, dtype, accumulate
        self.same_epoch, self.ranks = same_epoch, ranks
        length = source.batches_per_epoch
        if ranks is not None and not source.shared:  # an epoch is as long as the longest of the ranks' loaders
            lengths = gathered(length)
            length = None if None in lengths else max(each for each in lengths if each is not None)
        self.batches_per_epoch = limited(length, limit)
        self.steps_per_epoch = None if self.batches_per_epoch is None else -(-self.batches_per_epoch // accumulate)
        self.knows_length_from_user = (
            isinstance(source, IterableSource) and length is not None and limit is None and ranks is None
        )
        self.batch_size = source.batch_size if isinstance(source, GlobalOrderSource) else None
        self.samples_per_epoch = source.sampler.samples if isinstance(source, GlobalOrderSource) else 0
        self.yielded: StepBatch | None = None
        self.owed: Callable[[], bool] | None = None  # comes before the first step; returns whether there is to be none
        self.at_end = False
        self.goes_back: Callable[[], None] | None = None
        self.described = f"{source.described}; {accumulate} batches a step" if accumulate > 1 else source.described
        self.moves = device.type != "cpu" or dtype is not None
        # A batch is copied to the device while the one before it is trained on; only where fetching it draws nothing here.
        self.copies_ahead = device.type == "cuda" and source.in_workers
        # Of a source without a length: what held before the fetch that looked ahead, now and in the run that is resumed.
        self._before_fetch: tuple[dict[str, Any], tuple[Any, Any, Any, Any]] | None = None
        self._fetch_under: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None  # what was loaded, until a step comes
        self._passed_over: deque[int] = deque()  # of each step fetched: how many batches were left out right before it

    def steps(self, progress: Progress, restore_random: Callable[[], None] | None = None) -> Iterator[StepBatch]:
        """Yield the batches of step after step, endlessly, from `progress` on; the caller counts in `progress`.

        `restore_random` is called once, where the random states that were saved hold: before the iterator of an epoch is made,
        which draws from them, if that was still to come when they were saved; else after it.
        """
        while True:
            epoch, start = progress.epoch, progress.batch
            left_out, end = ranges_in(progress.left_out, epoch), self.batches_per_epoch
            end = None if end is None else end_without(left_out, end)
            if restore_random is not None and start == 0 and (epoch == 0 or self.source.reopens):
                if self._is_over(restore_random):
                    return
                restore_random = None
            opened = batches = self.source.epoch(0 if self.same_epoch else epoch, start)
            if end is not None:
                batches = itertools.islice(batches, end - start)
            if restore_random is not None and self._fetch_under is None:
                if self._is_over(restore_random):
                    return
                restore_random = None
            yield from self._epoch(self._steps_of(batches), progress, left_out, end, restore_random)
            restore_random = None
            if self.goes_back is not None:
                restore_random, self.goes_back = self.goes_back, None
                del opened, batches
                continue
            if progress.stopped_by is not None:  # before the first step
                return
            if progress.epoch == epoch:
                raise self._ended_early(progress)
            if self.knows_length_from_user and end == self.batches_per_epoch and next(opened, None) is not None:
                warnings.warn(
                    f"The training loader says that it has {self.batches_per_epoch} batches and gives more, which are left out. Its __len__ is "
                    "wrong, or several workers each yield the whole dataset (see torch.utils.data.get_worker_info).",
                    SheerWarning,
                    stacklevel=user_level(),
                )
            del opened, batches  # and with them their workers, before the next epoch starts its own

    def _steps_of(self, batches: Iterator[Taken]) -> Iterator[StepBatch]:
        """Group batches into steps."""
        if self.ranks is None:
            return grouped(batches, self.accumulate)
        if self.source.shared:
            steps = grouped_shares(batches, self.accumulate, self.ranks)
        else:
            steps = counted_steps(grouped(batches, self.accumulate), self.ranks)
        return steps if self.ranks.parallel.cp == 1 else with_own_sequences(steps, self.ranks)

    def _epoch(
        self,
        steps: Iterator[StepBatch],
        progress: Progress,
        left_out: Sequence[tuple[int, int]],
        end: int | None,
        restore_random: Callable[[], None] | None,
    ) -> Iterator[StepBatch]:
        passed = progress.batch
        self._passed_over.clear()
        if left_out:
            steps = self._without(left_out, steps, passed)
        if end is None:
            yield from self._looking_ahead(steps, progress, restore_random)
            return
        if self.copies_ahead:
            steps = copied_ahead(steps, self.device, self.dtype)
        elif self.moves:
            steps = (self._moved(step) for step in steps)
        for step in steps:
            if left_out:
                over = self._passed_over.popleft()
                progress.batch += over
                passed += over
            passed += len(step)
            self.yielded, self.at_end, self._loaded = step, passed >= end, None
            yield step
            if self.goes_back is not None:
                return

    def _without(
        self, left_out: Sequence[tuple[int, int]], steps: Iterator[StepBatch], start: int
    ) -> Iterator[StepBatch]:
        """Pass over the steps whose batches are left out. They are read, so what is drawn for them is drawn as ever; not at an epoch's end."""
        over = 0
        for step in steps:
            if any(first <= start <= last for first, last in left_out):
                over += len(step)
            else:
                self._passed_over.append(over)
                over = 0
                yield step
            start += len(step)

    def _looking_ahead(
        self, steps: Iterator[StepBatch], progress: Progress, restore_random: Callable[[], None] | None
    ) -> Iterator[StepBatch]:
        """Fetch one step ahead, since nothing else says which step is the last; keep the state from before that fetch."""
        if self._fetch_under is not None:
            set_random_state(self._fetch_under)
            self._fetch_under = None
        following = next(steps, None)
        if restore_random is not None and self._is_over(restore_random):
            return
        while following is not None:
            progress.batch += self._passed_over.popleft() if self._passed_over else 0
            step, before, taken = following, self.source.state_dict(), snapshot()
            following = next(steps, None)
            self.at_end = following is None
            self._before_fetch = None if self.at_end else (before, taken)
            self.yielded, self._loaded = self._moved(step) if self.moves else step, None
            yield self.yielded
            if self.goes_back is not None:
                return

    def _is_over(self, restore_random: Callable[[], None]) -> bool:
        """Put the random states back, and do what an earlier session has left; whether the run is over with that."""
        restore_random()
        return self.owed is not None and self.owed()

    def _moved(self, step: StepBatch) -> StepBatch:
        pin = self.device.type == "cuda"
        return step.holding((move(part, self.device, self.dtype, pin), samples) for part, samples in step)

    def _ended_early(self, progress: Progress) -> DataError:
        if self.batches_per_epoch is None:
            return DataError(
                f"The training loader gave no batch in epoch {progress.epoch + 1}. It is empty, or it can be iterated only once, as a "
                "generator can. Pass something that starts anew each time it is iterated, or set max_steps to what one pass gives."
            )
        return DataError(
            f"The training loader ended after {progress.batch} of {self.batches_per_epoch} batches in epoch {progress.epoch + 1}. Either its "
            "__len__ is wrong, or a StopIteration was raised in the dataset or collate_fn, which ends the iteration silently."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the source as it was at the last batch yielded; before the first as it was loaded."""
        if self._loaded is not None:
            return self._loaded
        if self._before_fetch is not None:
            before, taken = self._before_fetch
            return {**self._kind(), "source": before, "random": random_state(taken)}
        return {**self._kind(), "source": self.source.state_dict(), "random": None}

    def _kind(self) -> dict[str, Any]:
        return {"kind": type(self.source).__name__, "batches": self.batches_per_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the source its state back: before `steps` is called, or to go back.

        Raises:
            DataError: the data is not that of the run that goes on.
        """
        advice = "Give it the same data, or start a new run in another run_dir."
        if state["kind"] != self._kind()["kind"]:
            raise DataError(
                f"The run was made with another kind of loader ({state['kind']}; now {self._kind()['kind']}), so its position means nothing "
                f"here. {advice}"
            )
        self.source.load_state_dict(state["source"])
        if state["batches"] != self.batches_per_epoch:
            raise DataError(
                f"The run was made with {state['batches']} batches an epoch, and now there are {self.batches_per_epoch}. {advice}"
            )
        self._fetch_under, self._before_fetch, self._loaded = state["random"], None, state


def ranges_in(left_out: Sequence[Sequence[int]], epoch: int) -> list[tuple[int, int]]:
    """Return the first and the last of the batches of an epoch that are left out."""
    return [(first, last) for of_epoch, first, last in left_out if of_epoch == epoch]


def end_without(left_out: Sequence[tuple[int, int]], batches: int) -> int:
    """Return how many batches of an epoch there are up to the last that is not left out."""
    while any(first < batches <= last + 1 for first, last in left_out):
        batches -= 1
    return batches


def grouped(batches: Iterator[Taken], size: int) -> Iterator[StepBatch]:
    """Put `size` batches of the loader in a step; the last step of an epoch takes what is left."""
    if size == 1:
        return map(_alone, batches)
    return iter(functools.partial(_next_of, batches, size), StepBatch())


def _next_of(batches: Iterator[Taken], size: int) -> StepBatch:
    return StepBatch(itertools.islice(batches, size))


def _alone(batch: Taken) -> StepBatch:
    return StepBatch((batch,))


def copied_ahead(steps: Iterator[StepBatch], device: torch.device, dtype: torch.dtype | None) -> Iterator[StepBatch]:
    """Yield steps on the device; the next one is copied from pinned memory on a stream of its own meanwhile.

    The copy waits for what was enqueued before it, so the memory of the step before last, which it may get, is free by then;
    nothing waits on the host.
    """
    stream = torch.Stream(device)
    following = _copied(next(steps, None), device, dtype, stream)
    while following is not None:
        torch.accelerator.current_stream(device).wait_stream(stream)
        step, following = following, None
        following = _copied(next(steps, None), device, dtype, stream)
        yield step


def _copied(
    step: StepBatch | None, device: torch.device, dtype: torch.dtype | None, stream: torch.Stream
) -> StepBatch | None:
    if step is None:
        return None
    stream.wait_stream(torch.accelerator.current_stream(device))
    with stream:
        return step.holding((move(part, device, dtype, pin=True), samples) for part, samples in step)
