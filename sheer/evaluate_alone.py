"""`Trainer.validate`, `test` and `predict`: an evaluation without a run around it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sheer.build import make_compute, place_model, resolve_device, takes_step_number
from sheer.data.choose import check_loader
from sheer.distributed.agree import gathered
from sheer.distributed.buffers import same_buffers
from sheer.distributed.mesh import Ranks, form_ranks
from sheer.distributed.steps import evaluator_of
from sheer.distributed.wrap import stepped_model, stepper_of
from sheer.errors import RunError
from sheer.evaluation import Compute, Evaluation, evaluate, named_loaders, predict
from sheer.events import Events, RunInfo, events_of
from sheer.float8 import use_float8
from sheer.loggers.base import Loggers
from sheer.loss import Step
from sheer.metrics import Media
from sheer.plugins import Plugins
from sheer.progress import Progress
from sheer.settings import Settings
from sheer.start import set_backends
from sheer.weights import load_weights


@dataclass(frozen=True)
class Reporter:
    """What the loggers of a run need to be told more, mostly when it is over."""

    loggers: Loggers
    info: RunInfo
    progress: Progress
    stepper: nn.Module | None  # what runs the steps of the model that was trained, where it is divided over ranks

    def report(self, metrics: Mapping[str, float], media: Mapping[str, Media]) -> None:
        """Hand metrics, pictures and texts to the loggers; those of a run that is over are opened for it, and closed."""
        is_over = not self.loggers.are_open
        if is_over:
            self.loggers.start(self.info)
        self.loggers.log(self.progress.step, metrics)
        self.loggers.log_media(self.progress.step, media)
        if is_over:
            self.loggers.close()


def evaluate_alone(
    cfg: Settings,
    plugins: Plugins,
    model: nn.Module,
    step: Step,
    loader: Any,
    prefix: str,
    checkpoint: str | Path | None,
    run_dir: Path | None,
    reporter: Reporter | None,
    limit: int | float | None,
) -> dict[str, float]:
    """Return the metrics of `step` over a loader, all of whose batches count once, on whichever rank."""
    numbered = takes_step_number(step, model=model)
    for _, part in named_loaders(loader):
        check_loader(part, "The loader to evaluate on", passes=1)
    prepared = prepare(cfg, plugins, model, checkpoint, run_dir, reporter)
    evaluation = Evaluation(step, loader, prefix, limit, numbered)
    media: dict[str, Media] = {}
    metrics = evaluate(
        model,
        evaluation,
        prepared.compute,
        prepared.events,
        0,
        media,
        prepared.ranks,
        evaluator_of(prepared.stepper, prepared.ranks),
    )
    if reporter is not None:
        reporter.report(metrics, media)
    return metrics


def predict_alone(
    cfg: Settings,
    plugins: Plugins,
    model: nn.Module,
    step: Step,
    loader: Any,
    checkpoint: str | Path | None,
    run_dir: Path | None,
    reporter: Reporter | None,
    limit: int | float | None,
) -> Iterator[Any]:
    """Return an iterator over what `step` returns for each batch."""
    if takes_step_number(step, model=model):
        step = functools.partial(step, step=0)
    check_loader(loader, "The loader to predict on", passes=1)
    prepared = prepare(cfg, plugins, model, checkpoint, run_dir, reporter)
    if prepared.ranks is not None:
        gathered(
            None
        )  # all are here: who predicts needs no other, and rank 0 takes with it the store in which others still look for theirs
    stepper = evaluator_of(prepared.stepper, prepared.ranks)
    return predict(model, step, loader, prepared.compute, prepared.events, limit, prepared.ranks, stepper)


@dataclass(frozen=True)
class Prepared:
    """What an evaluation without a run needs."""

    compute: Compute
    events: Events
    ranks: Ranks | None
    stepper: nn.Module | None


def prepare(
    cfg: Settings,
    plugins: Plugins,
    model: nn.Module,
    checkpoint: str | Path | None,
    run_dir: Path | None,
    reporter: Reporter | None,
) -> Prepared:
    """Put the model where it is computed, with the weights of a checkpoint if one is meant. On several ranks each has all of it, or its part.

    Raises:
        RunError: there is no such checkpoint, or it is of another model.
    """
    compute = make_compute(cfg.precision, resolve_device(cfg.device))
    set_backends(cfg)
    if cfg.precision == "float8-mixed":
        use_float8(model, compute.device)
    callbacks = list(plugins.callbacks)
    if checkpoint is not None:
        if checkpoint in ("best", "last"):
            if run_dir is None:
                raise RunError(
                    f"checkpoint={checkpoint!r} is of a run, and this trainer has none yet. Set run_dir, call fit first, or give a path."
                )
            load_weights(model, run_dir, str(checkpoint))
        else:
            load_weights(model, checkpoint)
        callbacks = [
            c for c in callbacks if not hasattr(c, "averages")
        ]  # these weights are to be used, not the averages
    ranks = form_ranks(cfg.parallel, compute.device, plugins.mesh)
    stepper = reporter.stepper if reporter is not None and ranks is not None else None
    if stepper is None or model is not stepped_model(stepper):  # not the one that was trained, which is divided already
        stepper = stepper_of(model, ranks)
        place_model(model, compute)
    if ranks is not None:
        same_buffers(model, ranks)
    return Prepared(compute, events_of(callbacks), ranks, stepper)
