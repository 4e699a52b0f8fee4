"""Several loaders at once: a dict of them gives dicts of batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sheer.data.source import Source, Taken
from sheer.errors import DataError
from sheer.random import random_state, set_random_state


class CombinedSource:
    """Several loaders at once: each batch is a dict with one batch of each.

    An epoch is one pass over the longest. A shorter one makes one pass after the other, and goes on where it is when the longest
    starts anew.
    """

    def __init__(self, sources: dict[str, Source]) -> None:
        unsized = [name for name, source in sources.items() if source.batches_per_epoch is None]
        if unsized or not sources:
            raise DataError(
                f"Loaders in a dict need a length, which {unsized or 'an empty dict'} has not. Combine them in one iterable of your own."
            )
        self.passes = {name: Passes(name, source) for name, source in sources.items()}
        self.longest = max(part.length for part in self.passes.values())
        self.batches_per_epoch: int | None = self.longest
        # How far a shorter one has come is saved as it is: then nothing may be fetched ahead.
        self.in_workers = all(part.source.in_workers and part.length == self.longest for part in self.passes.values())
        self.shared = all(part.source.shared for part in self.passes.values())
        self.described = "; ".join(f"{name}: {source.described}" for name, source in sources.items())
        if any(part.source.shared for part in self.passes.values()) and not self.shared:
            raise DataError(
                f"Of the loaders in the dict some are divided over the ranks, and some give each rank its own: {self.described}. Give loaders of "
                "one kind."
            )
        self.reopens = True  # what a single loader draws at another time is undone, in `Passes.open`

    def epoch(self, epoch: int, start: int) -> Iterator[Taken]:
        """Open an epoch of the longest at its batch `start`; the samples of a step are those of the first loader."""
        for part in self.passes.values():
            if part.length == self.longest or (epoch == 0 and start == 0):
                part.go_to(epoch, start)
            if part.batches is None and (
                start == 0 or part.batch > 0
            ):  # one that has to start anew within an epoch draws when it does
                part.open()
        return self._zipped(self.longest - start)

    def _zipped(self, batches: int) -> Iterator[Taken]:
        for _ in range(batches):
            taken = [part.take() for part in self.passes.values()]
            yield {name: parts[0] for name, parts in zip(self.passes, taken, strict=True)}, *taken[0][1:]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each, and how far it has come."""
        return {
            name: {"source": part.source.state_dict(), "number": part.number, "batch": part.batch}
            for name, part in self.passes.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each its state back."""
        if state.keys() != self.passes.keys():
            raise DataError(
                f"The run was made with loaders named {', '.join(state)}, and these are named {', '.join(self.passes)}. Name them as "
                "they were, or start a new run in another run_dir."
            )
        for name, part in self.passes.items():
            part.source.load_state_dict(state[name]["source"])
            part.go_to(state[name]["number"], state[name]["batch"])
            part.begun = (part.number, part.batch) != (0, 0)

    def begin_anew(self) -> None:
        """Let each be as in a new process."""
        for part in self.passes.values():
            part.batches = None
            part.source.begin_anew()

    def close(self) -> None:
        """Close each."""
        for part in self.passes.values():
            part.batches = None
            part.source.close()


class Passes:
    """A loader of a dict: pass after pass over it, and how far the one that runs has come."""

    def __init__(self, name: str, source: Source) -> None:
        self.name, self.source, self.length = name, source, source.batches_per_epoch or 0
        self.number, self.batch = 0, 0
        self.begun = False  # whether a pass was opened, in this process or in that of which it is the resume
        self.batches: Iterator[Taken] | None = None

    def go_to(self, number: int, batch: int) -> None:
        """Be at a batch of a pass; it is opened when it is needed."""
        self.number, self.batch, self.batches = number, batch, None

    def open(self) -> Iterator[Taken]:
        """Open the pass where it is. What is drawn for that on resume, and was not in the run that was stopped, is put back."""
        draws = self.batch == 0 and (not self.begun or self.source.reopens)
        before = None if draws else random_state()
        self.begun, self.batches = True, self.source.epoch(self.number, self.batch)
        if before is not None:
            set_random_state(before)
        return self.batches

    def take(self) -> Taken:
        """Return the next batch; behind the last of a pass comes the first of the next."""
        taken = next(self.open() if self.batches is None else self.batches, None)
        if taken is None:
            raise DataError(
                f"The loader {self.name!r} ended after {self.batch} of {self.length} batches in its pass {self.number + 1}. Either its "
                "__len__ is wrong, or a StopIteration was raised in the dataset or collate_fn, which ends the iteration silently."
            )
        self.batch += 1
        if self.batch == self.length:
            self.go_to(self.number + 1, 0)
        return taken
