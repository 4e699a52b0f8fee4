"""Where the training batches come from: the contract of loaders, one class a case.

Each source yields the loader's batches of one epoch, from any position on, with the number of samples in each, and says in
`described` which case it is. See docs/data.md.
"""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
)

from sheer.data.batch import count_samples, same_tensors
from sheer.data.order import GlobalSampler, mix_seed
from sheer.data.shares import GlobalBatches, Shares, cut_shares, with_options_of
from sheer.distributed.agree import agreed, is_other_rank
from sheer.distributed.mesh import Ranks
from sheer.errors import DataError, SheerWarning, user_level
from sheer.random import random_state, seed_sample, set_generators, set_random_state, set_states_of, states_of

Taken = tuple[Any, ...]  # a batch and its samples; behind them those of the whole batch, where it is a part of one


class Source(Protocol):
    """Batches of one epoch after the other."""

    described: str  # for the start-up line
    batches_per_epoch: int | None  # None: only the end of an epoch tells
    in_workers: bool  # whether fetching a batch draws no random number in this process
    shared: bool  # whether it yields this rank's part of batches whose sizes it knows; else each rank's loader gives its own
    reopens: bool  # whether opening an epoch draws from this process; workers that persist draw only at their first

    def epoch(self, epoch: int, start: int) -> Iterator[Taken]:
        """Open an epoch at its batch `start`; yield each batch with its number of samples."""

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs besides the epoch and the position in it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, before `epoch` is called."""

    def begin_anew(self) -> None:
        """Be as in a new process, before `load_state_dict`: workers that persist end."""

    def close(self) -> None:
        """End the workers that were started here; left to the garbage collector, each would be waited for."""


class GlobalOrderSource:
    """A map-style DataLoader in its default order: rebuilt over a `GlobalSampler`. Any position opens at once."""

    def __init__(self, loader: DataLoader[Any], *, seed: int, device: torch.device, ranks: Ranks | None = None) -> None:
        self.ranks, self.shared = ranks, ranks is not None
        own = loader.sampler if isinstance(loader.sampler, GlobalSampler) else None
        shuffle = own.shuffle if own is not None else isinstance(loader.sampler, RandomSampler)
        seed = own.seed if own is not None else generator_seed(loader, seed)
        self.batch_size, size = loader.batch_size or 1, len(loader.dataset)  # type: ignore[arg-type]
        self.sampler = GlobalSampler(
            range(size), shuffle=shuffle, seed=seed, drop_last=loader.drop_last, batch_size=self.batch_size
        )
        self.one_by_one = loader.batch_size is None
        self.in_workers = loader.num_workers > 0
        batching: dict[str, Any] = {
            "batch_size": loader.batch_size,
            "sampler": self.sampler,
            "drop_last": loader.drop_last,
        }
        if self.in_workers:
            batching["sampler"] = KeyedSampler(self.sampler)
        self.shares = Shares(GlobalBatches(self.sampler), ranks) if ranks is not None and not self.one_by_one else None
        if self.shares is not None:
            batching = {"batch_sampler": KeyedSampler(self.shares, lists=True) if self.in_workers else self.shares}
        self.loader = rebuilt(loader, batching, seed=seed, device=device)
        self.generators = generators_of(loader)
        self.reopens = not loader.persistent_workers
        self.batches_per_epoch: int | None = -(-self.sampler.samples // self.batch_size)
        order = f"shuffled by seed {seed}" if shuffle else "in order"
        self.described = f"{self.sampler.samples:,} samples {order}"
        if self.batches_per_epoch == 0:
            dropped = (
                f" The {size} in it do not fill one batch of {self.batch_size}, and drop_last drops them."
                if size
                else ""
            )
            raise DataError(f"The training loader is empty: there is no batch to train on.{dropped}")

    def epoch(self, epoch: int, start: int) -> Iterator[Taken]:
        """Open an epoch at its batch `start`, without reading what comes before."""
        self.sampler.set_epoch(epoch, start * self.batch_size)
        if self.shares is not None:
            self.shares.epoch = epoch
            return self.shares.taken(iter(self.loader))
        batches = iter(self.loader)
        if self.ranks is not None:
            return cut_shares(batches, self.ranks)
        if self.one_by_one:
            return ((batch, count_samples(batch)) for batch in batches)
        full, rest = divmod(self.sampler.samples - start * self.batch_size, self.batch_size)
        counts = itertools.chain(itertools.repeat(self.batch_size, full), [rest] if rest else [])
        return zip(batches, counts, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on, and the states of the user's own generators."""
        return {
            "seed": self.sampler.seed,
            "samples": self.sampler.samples,
            "batch_size": self.batch_size,
            "shuffle": self.sampler.shuffle,
            "generators": [generator.get_state() for generator in self.generators],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the seed of the run that goes on; refuse other data."""
        for name, what in (
            ("samples", "samples in the training data"),
            ("batch_size", "samples in a batch of the loader"),
        ):
            if state[name] != self.state_dict()[name]:
                raise DataError(
                    f"The run was made with {state[name]} {what}, and now there are {self.state_dict()[name]}: it cannot go on "
                    "with the same order. Give it the same data, batch_size and drop_last, or start a new run in another run_dir."
                )
        if state["shuffle"] != self.sampler.shuffle:
            raise DataError(
                f"The run was made with shuffle={state['shuffle']}, and the loader now has shuffle={self.sampler.shuffle}: it cannot go on in the "
                "same order. Put it back, or start a new run in another run_dir."
            )
        self.sampler.seed = state["seed"]
        if isinstance(self.loader.dataset, SeededDataset):
            self.loader.dataset.seed = state["seed"]
        set_generators(self.generators, state["generators"])

    def begin_anew(self) -> None:
        """End workers that persist."""
        self.loader._iterator = None

    def close(self) -> None:
        """Let go of the loader that was made here, and thereby of its workers."""
        del self.loader


class OwnOrderSource:
    """A map-style DataLoader with a sampler of the user's own: its indices are replayed on resume, no data is read.

    With `same_epoch` they are replayed in each epoch.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        seed: int,
        device: torch.device,
        same_epoch: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks, self.shared = ranks, ranks is not None
        self.order = ReplayedSampler(loader, same_epoch=same_epoch, ranks=ranks)
        self.in_workers = loader.num_workers > 0
        self.shares = Shares(self.order, ranks) if ranks is not None and loader.batch_sampler is not None else None
        divided: Sampler[Any] = self.order if self.shares is None else self.shares
        order: Sampler[Any] = (
            KeyedSampler(divided, lists=loader.batch_sampler is not None) if self.in_workers else divided
        )
        batching: dict[str, Any] = (
            {"batch_sampler": order} if loader.batch_sampler is not None else {"batch_size": None, "sampler": order}
        )
        self.loader = rebuilt(loader, batching, seed=seed, device=device)
        self.reopens = True  # what workers that persist draw when they start in a later epoch is undone, in `epoch`
        self.persistent, self.opened = loader.persistent_workers, False
        self.batches_per_epoch = self.order.length
        name = type(
            loader.batch_sampler if type(loader.batch_sampler) not in (BatchSampler, type(None)) else loader.sampler
        ).__name__
        self.described = f"in the order of {name}"
        if self.batches_per_epoch == 0:
            raise DataError(f"The training loader is empty: its {name} yields no index.")

    def epoch(self, epoch: int, start: int) -> Iterator[Taken]:
        """Open an epoch at its batch `start`: the indices before it are drawn again, not read."""
        goes_on = self.order.drawn_under is not None and start == 0
        late = self.persistent and not self.opened and goes_on  # the run goes on; its workers are new
        self.order.open(epoch, start, states_of(self.order.generators) if late else None)
        self.opened = True
        if self.shares is not None:
            self.shares.epoch = epoch
            return self.shares.taken(iter(self.loader))
        if self.ranks is not None:
            return cut_shares(iter(self.loader), self.ranks)
        return ((batch, count_samples(batch)) for batch in iter(self.loader))

    def state_dict(self) -> dict[str, Any]:
        """Return the random states that the epoch's indices were drawn under, and those of the user's own generators now."""
        generators = [generator.get_state() for generator in self.order.generators]
        seed = self.loader.dataset.seed if isinstance(self.loader.dataset, SeededDataset) else None
        return {"drawn_under": self.order.drawn_under, "generators": generators, "seed": seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw the indices of the epoch to come under the states that were saved."""
        self.order.drawn_under = state["drawn_under"]
        self.order.saved_generators = state["generators"]
        if isinstance(self.loader.dataset, SeededDataset) and state.get("seed") is not None:
            self.loader.dataset.seed = state["seed"]
        set_generators(self.order.generators, state["generators"])

    def begin_anew(self) -> None:
        """End workers that persist, and forget that they were started."""
        self.loader._iterator, self.opened = None, False

    def close(self) -> None:
        """Let go of the loader that was made here, and thereby of its workers."""
        del self.loader


class ReplayedSampler(Sampler[Any]):
    """A user's sampler or batch sampler, whose random states at the start of an epoch are kept, so that it can be drawn again."""

    def __init__(self, loader: DataLoader[Any], *, same_epoch: bool, ranks: Ranks | None = None) -> None:
        self.same_epoch, self.ranks = same_epoch, ranks
        self.inner: Iterable[Any] = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
        self.samplers: list[Any] = [
            loader.sampler,
            getattr(loader.batch_sampler, "sampler", None),
            loader.batch_sampler,
        ]
        self.generators = generators_of(loader)
        self.length = sized(self.inner)
        self.drawn_under: dict[str, Any] | None = None
        self.draw_under: dict[str, Any] | None = None
        self.saved_generators: list[torch.Tensor] | None = None
        self.epoch, self.start = 0, 0

    def open(self, epoch: int, start: int, draw_under: dict[str, Any] | None = None) -> None:
        """Prepare the next iteration: from `start` on; a new epoch is drawn under the states as they are then, or as given."""
        self.epoch, self.start, self.draw_under = epoch, start, draw_under
        for sampler in self.samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        if self.draw_under is not None:
            set_states_of(self.generators, self.draw_under)
        now, begun, self.draw_under = states_of(self.generators), self.drawn_under, None
        replayed = (self.start > 0 or self.same_epoch) and begun is not None
        if replayed and begun is not None:
            set_states_of(self.generators, begun)
        else:
            self.drawn_under = agreed(self.ranks, now)
            if is_other_rank(self.ranks):  # all draw the order that rank 0 does
                set_states_of(self.generators, self.drawn_under)
        # All at once where the end is known: what a sampler draws must not mix with what the training draws.
        at_once = self.length is not None or self.ranks is not None
        indices = iter(list(self.inner)) if at_once else iter(self.inner)
        for _ in range(self.start):
            next(indices)
        if replayed:  # a loader that shares its generator with the sampler drew from it to start: not so before
            saved = self.saved_generators if self.start > 0 else None
            generators = now["generators"] if saved is None else saved
            set_states_of(self.generators, {"process": now["process"], "generators": generators})
        elif is_other_rank(self.ranks):
            set_random_state(now["process"])
        self.start, self.saved_generators = 0, None
        yield from indices


class StatefulSource:
    """A loader that keeps its own state, by `state_dict` and `load_state_dict`; it says itself where it goes on."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.batches_per_epoch = sized(loader)
        self.reopens = True
        self.shared = False
        self.in_workers = False  # its state must be that of the last batch trained on, so nothing is fetched ahead
        self.ended = True  # whether the loader was iterated to its end, rather than left by a limit
        self.loaded = False  # whether the next epoch is the first after `load_state_dict`
        self.described = f"from a {type(loader).__name__}, which keeps its own position"

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Any, int]]:
        """Open an epoch; a loader that was loaded in the middle of one goes on there."""
        resumed, self.loaded = self.loaded and start == 0, False
        states = random_state()
        if resumed and not self.ended:  # it would go on where a limit left it: be there, and leave it again
            iter(self.loader)
            set_random_state(states)
        if start == 0 and hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)
        batches = iter(self.loader)
        if resumed and self.ended and draws_twice(self.loader):
            set_random_state(states)
            iter(DataLoader([0]))  # type: ignore[arg-type]  # draws what one iterator does
        return self._counted(batches, start)

    def _counted(self, batches: Iterator[Any], start: int) -> Iterator[tuple[Any, int]]:
        """Yield batches with their samples; before the last is, the loader is brought to its end, as a `for` loop would."""
        self.ended = False
        for number, batch in enumerate(batches, start=start + 1):
            if number == self.batches_per_epoch:
                self.ended = next(batches, None) is None
            yield batch, count_samples(batch)
        self.ended = True

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's own state."""
        return {"loader": self.loader.state_dict(), "ended": self.ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the loader its state back."""
        self.loader.load_state_dict(state["loader"])
        self.ended, self.loaded = state["ended"], True

    def begin_anew(self) -> None:
        """Do nothing: the loader is the user's, and keeps no workers that were started here."""

    def close(self) -> None:
        """Leave the loader, which is the user's, as it is."""


def draws_twice(loader: Any) -> bool:
    """Whether a loader that was loaded at its end makes two iterators from the process's random numbers, as torchdata's does."""
    return type(loader).__module__.startswith("torchdata.") and loader.generator is None


class IterableSource:
    """Any other iterable of batches. A list can be entered anywhere; others only from their start, or by skipping."""

    def __init__(self, loader: Iterable[Any], *, resume_by_skipping: bool, ranks: Ranks | None = None) -> None:
        self.loader, self.ranks = loader, ranks
        self.shared = ranks is not None and isinstance(loader, Sequence)
        self.resume_by_skipping = resume_by_skipping
        self.batches_per_epoch = sized(loader)
        self.in_workers = isinstance(loader, DataLoader) and loader.num_workers > 0
        self.reopens = not (isinstance(loader, DataLoader) and loader.persistent_workers)
        counted = (loader, getattr(loader, "dataset", None))
        self.told: list[Any] = [each for each in counted if hasattr(each, "set_epoch")]  # the epoch
        self.generators = generators_of(loader)
        self.begun_under: dict[str, Any] | None = None  # the random states at the start of the epoch
        self.name = type(loader).__name__
        self.shared_by = 0  # workers that are to share an iterable dataset, until it was seen whether they do
        if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
            self.name += f" over {type(loader.dataset).__name__}"
            self.shared_by = loader.num_workers
        how = "by skipping" if resume_by_skipping else "only at the end of an epoch"
        self.described = f"from a {self.name}" + ("" if isinstance(loader, Sequence) else f", resumed {how}")
        if self.batches_per_epoch == 0:
            raise DataError(f"The training loader is empty: a {type(loader).__name__} of length 0.")

    def epoch(self, epoch: int, start: int) -> Iterator[Taken]:
        """Open an epoch; batches before `start` are read and dropped, if that is allowed."""
        if isinstance(self.loader, Sequence):
            batches: Iterator[Any] = itertools.islice(self.loader, start, None)
        elif start == 0 or self.resume_by_skipping:
            for told in self.told:
                told.set_epoch(epoch)
            if start > 0 and self.begun_under is not None:  # so that what is drawn for an order is drawn again
                set_states_of(self.generators, self.begun_under)
            else:
                self.begun_under = states_of(self.generators)
            batches = iter(self.loader)
            if self.shared_by > 1:
                batches = self._compared(batches)
            for _ in range(start):
                next(batches, None)
        else:
            raise DataError(
                f"The run stopped after {start} batches of an epoch, and a {self.name} cannot go on there: it has "
                "no state. Pass resume_by_skipping=True to fit to read and drop those batches, or use a map-style dataset, torchdata's "
                "StatefulDataLoader (a DataLoader does not save the state of its dataset), or an iterable of batches with state_dict and "
                "load_state_dict."
            )
        if self.ranks is not None and self.shared:
            return cut_shares(batches, self.ranks)
        return ((batch, count_samples(batch)) for batch in batches)

    def _compared(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Warn if the first two batches, which two workers made, are the same: then each worker yields all of the data."""
        workers, self.shared_by = self.shared_by, 0
        first = list(itertools.islice(batches, 2))
        if len(first) == 2 and same_tensors(*first):
            warnings.warn(
                f"Two workers of the {self.name} began with the same batch. If each of the {workers} yields the whole dataset, an epoch "
                f"trains on each sample {workers} times: let __iter__ yield the worker's share (torch.utils.data.get_worker_info), or set "
                "num_workers=1.",
                SheerWarning,
                stacklevel=user_level(),
            )
        return itertools.chain(iter(first), batches)

    def state_dict(self) -> dict[str, Any]:
        """Return the random states that the epoch began under, and those of the user's own generators now."""
        return {"begun_under": self.begun_under, "generators": [generator.get_state() for generator in self.generators]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the epoch that is skipped into under the states that were saved."""
        self.begun_under = state["begun_under"]
        set_generators(self.generators, state["generators"])

    def begin_anew(self) -> None:
        """Do nothing: the loader is the user's, and keeps no workers that were started here."""

    def close(self) -> None:
        """Leave the loader, which is the user's, as it is."""


def rebuilt(loader: DataLoader[Any], batching: dict[str, Any], *, seed: int, device: torch.device) -> DataLoader[Any]:
    """Make a plain DataLoader with the options of `loader` and another order; with workers, each sample gets a seed of its own."""
    dataset = SeededDataset(loader.dataset, seed) if loader.num_workers > 0 else loader.dataset
    pinned = loader.pin_memory or device.type == "cuda"  # a copy from other memory makes the host wait
    return with_options_of(loader, dataset, batching, pin_memory=pinned)


def generator_seed(loader: DataLoader[Any], otherwise: int) -> int:
    """Return the seed of the loader's own generator, if it was given one."""
    return loader.generator.initial_seed() if loader.generator is not None else otherwise


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return the generators that a loader, its samplers and its dataset hold, each once."""
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    owners = (sampler, getattr(batch_sampler, "sampler", None), batch_sampler, loader, getattr(loader, "dataset", None))
    held = [value for owner in owners for value in getattr(owner, "__dict__", {}).values()]
    return list({id(value): value for value in held if isinstance(value, torch.Generator)}.values())


def sized(loader: Any) -> int | None:
    """Return the length of a loader, or None where it has none."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


class KeyedSampler(Sampler[Any]):
    """The indices of another sampler, each with the epoch: what a `SeededDataset` seeds a sample by."""

    def __init__(self, inner: Any, *, lists: bool = False) -> None:
        self.inner, self.lists = inner, lists

    def __len__(self) -> int:
        return len(self.inner) if isinstance(self.inner, GlobalSampler) else getattr(self.inner, "length", 0) or 0

    def __iter__(self) -> Iterator[Any]:
        epoch = self.inner.epoch
        index: Any
        for index in self.inner:
            yield [(epoch, one) for one in index] if self.lists else (epoch, index)


class SeededDataset(Dataset[Any]):
    """A dataset in a worker, whose random numbers depend on (seed, epoch, index): on no worker, rank or order."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        if hasattr(dataset, "__getitems__") and not isinstance(dataset, Subset):
            self.__getitems__ = self._get_many  # DataLoader looks for it on the object

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        epoch, index = key
        self._seed(epoch, index)
        return self.dataset[index]

    def _get_many(self, keys: list[tuple[int, Any]]) -> Any:
        """Fetch a batch from a dataset that fetches many at once; its samples share the seed of the first."""
        self._seed(*keys[0])
        return self.dataset.__getitems__([index for _, index in keys])  # type: ignore[attr-defined]

    def _seed(self, epoch: int, index: Any) -> None:
        number = index if isinstance(index, int) else zlib.crc32(repr(index).encode())
        seed_sample(mix_seed(self.seed, epoch, number))
