"""Validate, test, predict: a model in eval mode, without gradients, over every batch once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from sheer.data.batch import count_samples, describe, move
from sheer.data.order import limited
from sheer.data.shares import counted_or_not, dealt, in_step_with_others
from sheer.data.source import sized
from sheer.distributed.buffers import same_buffers
from sheer.distributed.mesh import Ranks
from sheer.distributed.steps import evaluate_on_ranks, let_go
from sheer.errors import DataError
from sheer.events import Events
from sheer.leaving import Told
from sheer.metrics import Media, Metrics, contents
from sheer.signals import ToldToLeave


@dataclass(frozen=True, slots=True)
class Compute:
    """Where a step is computed, and in which precision."""

    device: torch.device
    autocast: AbstractContextManager[Any]  # entered around the step
    dtype: torch.dtype | None = None  # what floating inputs are converted to, where the model was

    def prepared(self, batch: Any) -> Any:
        """Return a batch where the step needs it."""
        if self.device.type == "cpu" and self.dtype is None:
            return batch
        return move(batch, self.device, self.dtype, pin=self.device.type == "cuda")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` is to do: which step over which loaders, and what its metrics are called."""

    step_function: Any
    loaders: Any  # one loader, or a mapping of names to loaders
    prefix: str  # "val/" or "test/"
    limit: int | float | None = None  # batches of each loader, or a share of them
    numbered: bool = False  # whether the step takes the number of the training step


def evaluate(
    model: nn.Module,
    evaluation: Evaluation,
    compute: Compute,
    events: Events,
    step: int,
    media: dict[str, Media],
    ranks: Ranks | None = None,
    stepper: nn.Module | None = None,
    told: Told | None = None,
) -> dict[str, float]:
    """Return the weighted means of what the step returns, over all batches.

    On several ranks each batch is computed on one of them. Where `told` says to leave, it ends with `ToldToLeave`.
    """
    with eval_mode(model, events):
        if ranks is not None:
            same_buffers(model, ranks)
        # Several loaders give names such as val/<loader>/<name>; pictures and texts go into `media`.
        means = [
            evaluate_loader(
                model, evaluation, compute, loader, evaluation.prefix + loader_name, step, media, ranks, stepper, told
            )
            for loader_name, loader in named_loaders(evaluation.loaders)
        ]
        if stepper is not None:
            let_go(stepper)
    return {name: value for part in means for name, value in part.items()}


def evaluate_loader(
    model: nn.Module,
    evaluation: Evaluation,
    compute: Compute,
    loader: Any,
    prefix: str,
    step: int,
    media: dict[str, Media],
    ranks: Ranks | None,
    stepper: nn.Module | None,
    told: Told | None,
) -> dict[str, float]:
    """Run the evaluation's step over the batches of one loader; its metrics are called `<prefix><name>`."""
    metrics = Metrics()
    where = _Place(prefix)
    with (
        where,
        closing(batches_of(loader, evaluation.limit, ranks, stepper is not None or told is not None)) as batches,
    ):  # on an error too, so that workers end now
        for batch, samples in batches:
            where.batch = batch
            if told is not None and told.to_leave():
                raise ToldToLeave
            batch = compute.prepared(batch)
            held = contents(metrics.objects()) if ranks is not None and samples == 0 else []
            with torch.no_grad(), compute.autocast:
                if stepper is not None and ranks is not None:
                    output = evaluate_on_ranks(
                        stepper, ranks, model, evaluation.step_function, evaluation.numbered, batch, step
                    )
                elif evaluation.numbered:
                    output = evaluation.step_function(model, batch, step)
                else:
                    output = evaluation.step_function(model, batch)
            if is_counted(ranks, samples, output):
                metrics.add(output, samples)
            elif samples == 0:  # run for the other ranks' sake
                metrics.take_back(output, held)
    media.update({prefix + name: value for name, value in metrics.take_media().items()})
    return {prefix + name: value for name, value in metrics.read(ranks).items()}


def is_counted(ranks: Ranks | None, samples: int, output: Any) -> bool:
    """Whether this rank measures what a step of an evaluation returned; another may have the last stage of the model."""
    return ranks is None or (samples > 0 and output is not None)


def batches_of(
    loader: Iterable[Any], limit: int | float | None, ranks: Ranks | None, in_step: bool
) -> Generator[tuple[Any, int], None, None]:
    """Return the batches of a loader, each with its samples; on several ranks this one's, and as many as the others have where all go in step."""
    if ranks is None:
        return counted_batches(loader, limit)
    own = dealt(loader, limit, ranks)
    if own is None:
        return in_step_with_others(counted_batches(loader, limit), ranks)
    return counted_or_not(own, in_step)


class _Place:
    """Adds to an error which loader it was evaluated on, and the batch."""

    def __init__(self, prefix: str) -> None:
        self.what = prefix.strip("/")
        self.batch: Any = None

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            batch = "" if self.batch is None else f"; its batch: {describe(self.batch)}"
            error.add_note(f"While {self.what} was evaluated{batch}.")


def predict(
    model: nn.Module,
    step: Callable[..., Any],
    loader: Any,
    compute: Compute,
    events: Events,
    limit: int | float | None,
    ranks: Ranks | None = None,
    stepper: nn.Module | None = None,
) -> Iterator[Any]:
    """Yield what the step returns for each batch, as it comes; nothing is piled up. On several ranks each yields its own batches'."""
    with eval_mode(model, events):
        for batch, samples in batches_of(loader, limit, ranks, stepper is not None):
            batch = compute.prepared(batch)
            with (
                torch.no_grad(),
                compute.autocast,
            ):  # left before the caller goes on, whose gradients are its own affair
                if stepper is not None and ranks is not None:
                    output = evaluate_on_ranks(stepper, ranks, model, step, False, batch, 0)
                else:
                    output = step(model, batch)
            if ranks is None or (samples > 0 and ranks.place("pp") == ranks.last_place):
                yield output
        if stepper is not None:
            let_go(stepper)


@contextmanager
def eval_mode(model: nn.Module, events: Events) -> Iterator[None]:
    """Put the model in eval mode, with the averages of a callback that keeps some; then each part is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    for starting in events.evaluation_start:
        starting.on_evaluation_start(model)
    try:
        yield
    finally:
        for ending in reversed(events.evaluation_end):
            ending.on_evaluation_end(model)
        for module in training:
            module.training = True


def named_loaders(loaders: Any) -> list[tuple[str, Any]]:
    """Return loaders with the part of a metric's name that each adds: nothing where there is only one."""
    if isinstance(loaders, Mapping):
        return [(f"{name}/", loader) for name, loader in loaders.items()]
    return [("", loaders)]


def counted_batches(loader: Iterable[Any], limit: int | float | None = None) -> Generator[tuple[Any, int], None, None]:
    """Yield each batch with its number of samples: known from the order, or the leading dimension of its first tensor.

    Raises:
        DataError: the loader gave no batch, or fewer than it said.
    """
    length = sized(loader)
    most = None if limit is None else limited(length, limit)  # a length that says too little cuts nothing off
    size, samples = _known_samples(loader)
    given = 0
    for batch in itertools.islice(loader, most):
        given += 1
        if size is None:
            yield batch, count_samples(batch)
        else:
            yield batch, min(size, samples - (given - 1) * size)
    if given == 0 and limit != 0:
        raise DataError(
            f"The loader to evaluate on ({type(loader).__name__}) gave no batch. It is empty, or can be iterated only once."
        )
    expected = length if most is None else most
    if expected is not None and given < expected:
        raise DataError(
            f"The loader to evaluate on ended after {given} of {expected} batches. Either its __len__ is wrong, or a StopIteration was raised "
            "in the dataset or collate_fn, which ends the iteration silently."
        )


def _known_samples(loader: Any) -> tuple[int | None, int]:
    """Return the batch size and the number of samples of a DataLoader whose sampler says both."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return None, 0
    return loader.batch_size, len(loader.sampler)  # type: ignore[arg-type]
