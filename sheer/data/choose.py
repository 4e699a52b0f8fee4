"""Which case of docs/data.md a loader is, and what cannot be a loader."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from sheer.data.combined import CombinedSource
from sheer.data.grouping import LengthGroupedBatches
from sheer.data.order import GlobalSampler, mix_seed
from sheer.data.source import GlobalOrderSource, IterableSource, OwnOrderSource, Source, StatefulSource, sized
from sheer.distributed.mesh import Ranks
from sheer.errors import DataError


def check_loader(loader: Any, what: str, *, passes: int) -> None:
    """Raise `DataError` for what cannot yield batches, or not as many times as it will be iterated."""
    if isinstance(loader, Mapping):
        for part in loader.values():
            check_loader(part, what, passes=passes)
    elif isinstance(loader, type):
        raise DataError(f"{what} is the class {loader.__name__}; give an object.")
    elif isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise DataError(
            f"{what} is a dataset ({type(loader).__name__}). Wrap it: DataLoader(dataset, batch_size=..., shuffle=True)."
        )
    elif isinstance(loader, (list, tuple)) and loader and isinstance(loader[0], (DataLoader, Dataset)):
        raise DataError(
            f"{what} is a {type(loader).__name__} of {type(loader[0]).__name__}s. Give a dict, which names each: {{'a': loader_a, 'b': loader_b}}."
        )
    elif isinstance(loader, (torch.Tensor, str)):
        raise DataError(
            f"{what} is a {type(loader).__name__}. Wrap it: DataLoader(TensorDataset(x, y), batch_size=...)."
        )
    elif not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise DataError(f"{what} must yield batches when iterated, and a {type(loader).__name__} cannot be iterated.")
    elif passes > 1 and isinstance(loader, Iterator) and type(loader).__module__ in ("builtins", "itertools"):
        raise DataError(
            f"{what} is a {type(loader).__name__}, which can be iterated only once, and it is to be {passes} times. Pass something that "
            "starts anew each time it is iterated: a DataLoader, a list, or an object whose __iter__ is the generator function."
        )
    refuse_other_lengths(loader, what)


def refuse_other_lengths(loader: Any, what: str) -> None:
    """Raise `DataError` where batches of alike lengths were made of the lengths of another number of samples than the dataset has."""
    for batches in (getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)):
        if not isinstance(batches, LengthGroupedBatches):
            continue
        lengths, samples = len(batches.kinds), sized(getattr(loader, "dataset", None))
        if samples is None or samples == lengths:
            continue
        result = f"{samples - lengths:,} samples would never be seen" if samples > lengths else "some are of no sample"
        raise DataError(
            f"{what} has a dataset of {samples:,} samples, and LengthGroupedBatches was given {lengths:,} lengths: {result}. Give it the length of each "
            "sample of this very dataset, in its order."
        )


def make_source(
    loader: Any,
    *,
    seed: int,
    device: torch.device,
    resume_by_skipping: bool = False,
    same_epoch: bool = False,
    ranks: Ranks | None = None,
) -> Source:
    """Choose the case that `loader` is; `same_epoch` says that its first epoch is to be seen again and again.

    Raises:
        DataError: `loader` is empty, or may give other batches when it is iterated again and is to give the same.
    """
    if isinstance(loader, Mapping):
        # Each its own order: with one seed, sample i of one would always come with sample i of the other.
        seeds = (seed if index == 0 else mix_seed(seed, index) for index in itertools.count())
        sources = {
            name: make_source(
                part,
                seed=own,
                device=device,
                resume_by_skipping=resume_by_skipping,
                same_epoch=same_epoch,
                ranks=ranks,
            )
            for (name, part), own in zip(loader.items(), seeds, strict=False)
        }
        return CombinedSource(sources)
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        if same_epoch:
            raise _may_differ(loader)
        return StatefulSource(loader)
    if isinstance(loader, DataLoader) and _is_map_style(loader) and type(loader).__iter__ is DataLoader.__iter__:
        if _has_default_order(loader):
            return GlobalOrderSource(loader, seed=seed, device=device, ranks=ranks)
        if isinstance(loader.sampler, DistributedSampler) and ranks is not None:
            raise DataError(
                "The training loader has a DistributedSampler, and each rank would train on a part of its part. Leave it out "
                "(DataLoader(dataset, batch_size=..., shuffle=True)): every batch is divided over the ranks."
            )
        return OwnOrderSource(loader, seed=seed, device=device, same_epoch=same_epoch, ranks=ranks)
    if same_epoch and not isinstance(loader, Sequence):
        raise _may_differ(loader)
    return IterableSource(loader, resume_by_skipping=resume_by_skipping, ranks=ranks)


def refuse_one_way(source: Source) -> None:
    """Raise `DataError` for data that a run cannot go back in while it trains."""
    if isinstance(source, CombinedSource):
        for part in source.passes.values():
            refuse_one_way(part.source)
    if not isinstance(source, IterableSource) or isinstance(source.loader, Sequence):
        return
    if not source.resume_by_skipping:
        raise DataError(
            f"nonfinite=Rollback(...) goes back in the training data, and a {source.name} has no state. Pass resume_by_skipping=True to fit to read "
            'and drop what comes before, use a map-style dataset or a loader with state_dict and load_state_dict, or set nonfinite="skip".'
        )
    if getattr(source.loader, "persistent_workers", False):
        raise DataError(
            f"nonfinite=Rollback(...) goes back in the training data, and the workers of a {source.name} that persist would not. Set "
            "persistent_workers=False."
        )


def _may_differ(loader: Any) -> DataError:
    return DataError(
        f"overfit_batches trains on the same batches in each epoch, and a {type(loader).__name__} may give others each time it is "
        "iterated. Pass its first ones as a list: list(itertools.islice(loader, n))."
    )


def _is_map_style(loader: DataLoader[Any]) -> bool:
    return not isinstance(loader.dataset, IterableDataset)


def _has_default_order(loader: DataLoader[Any]) -> bool:
    """Whether the order is DataLoader's own (`shuffle=True` or False), or already the global one."""
    if loader.batch_size is None and loader.batch_sampler is not None:
        return False  # given by the user; `sampler` then says nothing
    if type(loader.sampler) is RandomSampler:
        return not loader.sampler.replacement and loader.sampler.num_samples == sized(loader.dataset)
    return type(loader.sampler) in (SequentialSampler, GlobalSampler)
