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
from sheer.errors import RunError
from sheer.evaluation import Compute, Evaluation, evaluate, named_loaders, predict
from sheer.events import Events, RunInfo, events_of
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
    """Return the metrics of `step` over a loader."""
    numbered = takes_step_number(step, model=model)
    for _, part in named_loaders(loader):
        check_loader(part, "The loader to evaluate on", passes=1)
    compute, events = prepare(cfg, plugins, model, checkpoint, run_dir)
    evaluation = Evaluation(step, loader, prefix, limit, numbered)
    media: dict[str, Media] = {}
    metrics = evaluate(model, evaluation, compute, events, 0, media)
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
    limit: int | float | None,
) -> Iterator[Any]:
    """Return an iterator over what `step` returns for each batch."""
    if takes_step_number(step, model=model):
        step = functools.partial(step, step=0)
    check_loader(loader, "The loader to predict on", passes=1)
    compute, events = prepare(cfg, plugins, model, checkpoint, run_dir)
    return predict(model, step, loader, compute, events, limit)


def prepare(
    cfg: Settings, plugins: Plugins, model: nn.Module, checkpoint: str | Path | None, run_dir: Path | None
) -> tuple[Compute, Events]:
    """Put the model where it is computed, with the weights of a checkpoint if one is meant.

    Raises:
        RunError: there is no such checkpoint, or it is of another model.
    """
    compute = make_compute(cfg.precision, resolve_device(cfg.device))
    set_backends(cfg)
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
    place_model(model, compute)
    return compute, events_of(callbacks)
