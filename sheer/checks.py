"""What is refused before the first step: what is missing, contradictory, or followed and not there."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from sheer.checkpoint.codec import encode
from sheer.data.source import generators_of
from sheer.distributed.steps import evaluator_of
from sheer.errors import ModelError, SettingsError, SheerWarning, user_level
from sheer.evaluation import Evaluation, evaluate, named_loaders
from sheer.events import Follows
from sheer.metrics import Computed, contents, put_back
from sheer.plugins import Plugins
from sheer.random import set_states_of, states_of
from sheer.run import Run
from sheer.saving import refuse_divided, state_of
from sheer.settings import Settings

HIGHER_IS_BETTER = frozenset(
    {"acc", "accuracy", "auc", "auroc", "f1", "precision", "recall", "r2", "bleu", "iou", "map", "psnr", "ssim"}
)


def check_start(cfg: Settings, plugins: Plugins, model: nn.Module) -> None:
    """Raise for what is missing or contradictory before anything is made."""
    if cfg.max_steps is None and cfg.max_epochs is None and cfg.max_time is None:
        raise SettingsError(
            "How long is the training to take? Give max_steps, max_epochs or max_time (or fast_dev_run=True)."
        )
    if isinstance(model, type):
        raise ModelError(f"model is the class {model.__name__}. Give an object: {model.__name__}(...).")
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The model must be an nn.Module, not a {type(model).__name__}. Several networks go into one nn.Module."
        )
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ModelError(
            f"The model's {', '.join(lazy[:3])} {'has' if len(lazy) == 1 else 'have'} no shape yet. Call the model once on a batch before "
            "the optimizer is built."
        )
    words = set(re.split(r"[^a-z0-9]+", (cfg.monitor or "").lower()))
    if cfg.monitor_mode == "min" and words & HIGHER_IS_BETTER and not words & {"loss", "error"}:
        warnings.warn(
            f'monitor={cfg.monitor!r} with monitor_mode="min" keeps the checkpoint where it is lowest. If more is better, set monitor_mode="max".',
            SheerWarning,
            stacklevel=user_level(),
        )
    averaging = [type(callback).__name__ for callback in plugins.callbacks if hasattr(callback, "averages")]
    if len(averaging) > 1:
        raise SettingsError(
            f"{' and '.join(averaging)} both have weights for evaluation, and only one of them can be used. Leave one out."
        )


def refuse_unfollowed(cfg: Settings, validation: Evaluation | None, scheduler: Any) -> None:
    """Raise `SettingsError` where something follows a validation, and there is none."""
    if validation is not None:
        return
    if cfg.monitor is not None:
        raise SettingsError(
            f"monitor={cfg.monitor!r} is a metric of the validation, and there is none. Give fit a val_loader."
        )
    if scheduler is not None and cfg.scheduler_interval == "validation":
        raise SettingsError(
            'scheduler_interval="validation" moves the scheduler after each validation, and there is none. Give fit a val_loader, or '
            'set "step" or "epoch".'
        )
    if cfg.limit_val_batches != 0 and (cfg.validate_every_n_steps is not None or cfg.validate_first):
        warnings.warn(
            "validate_every_n_steps and validate_first do nothing: fit was given no val_loader.",
            SheerWarning,
            stacklevel=user_level(),
        )


def check_can_be_saved(run: Run) -> None:
    """Raise an error for a callback, optimizer or scheduler whose state cannot be saved: now, not at the first save."""
    tensors: dict[str, Tensor] = {}
    encode(state_of(run), tensors)
    refuse_divided(tensors)


def check_length_of_schedules(cfg: Settings, run: Run) -> None:
    """Raise `ModelError` where a `OneCycleLR` ends before the run does, as it would in the middle of the training."""
    for scheduler in run.schedulers.values():
        if not isinstance(scheduler, OneCycleLR) or cfg.scheduler_interval != "step" or run.total_steps is None:
            continue
        if scheduler.total_steps < run.total_steps:
            raise ModelError(
                f"The OneCycleLR ends after {scheduler.total_steps:,} steps, and the run has {run.total_steps:,}; then it raises an error. "
                "Pass a function, scheduler=lambda optimizer, total_steps: OneCycleLR(optimizer, max_lr, total_steps), or set max_steps."
            )


def check_monitor(cfg: Settings, run: Run, metrics: Mapping[str, float]) -> None:
    """Raise `SettingsError` if what is followed is not among the metrics that a validation returned."""
    followed = {f"monitor={cfg.monitor!r}": cfg.monitor} if cfg.monitor is not None else {}
    for callback in run.events.validation_end:
        if isinstance(callback, Follows):
            followed[f"{type(callback).__name__}(monitor={callback.follows!r})"] = callback.follows
    for who, metric in followed.items():
        if metric not in metrics:
            near = difflib.get_close_matches(metric, metrics, n=1)
            advice = f" Did you mean {near[0]!r}?" if near else ""
            raise SettingsError(
                f"{who} is no metric that the validation returned; there are: {', '.join(metrics)}.{advice}"
            )


def try_validation(cfg: Settings, run: Run, validation: Evaluation) -> None:
    """Evaluate one batch of each loader, and see that the monitored metric is there; then all is as it was before.

    Raises:
        SettingsError: `monitor` names no metric of the validation.
    """
    loaders = [loader for _, loader in named_loaders(validation.loaders)]
    generators = [generator for loader in loaders for generator in generators_of(loader)]
    positions = [(loader, copy.deepcopy(loader.state_dict())) for loader in loaders if has_position(loader)]
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    counts = contents(metrics_in(run.model))
    states = states_of(generators)
    trial = dataclasses.replace(validation, loaders=copied(validation.loaders), limit=1)
    try:
        metrics = evaluate(
            run.model,
            trial,
            run.compute,
            run.events,
            run.progress.step,
            {},
            run.ranks,
            evaluator_of(run.stepper, run.ranks),
        )
    except Exception as error:
        error.add_note("This was the trial of the validation: one batch of each loader, before the first step.")
        raise
    set_states_of(generators, states)
    for loader, position in positions:
        loader.load_state_dict(position)
    put_back(counts)
    with torch.no_grad():
        for name, buffer in run.model.named_buffers():
            buffer.copy_(buffers[name])
    check_monitor(cfg, run, metrics)


def metrics_in(model: nn.Module) -> list[Any]:
    """Return the metric objects inside a model."""
    return [module for module in model.modules() if isinstance(module, Computed) and hasattr(module, "update")]


def copied(loaders: Any) -> Any:
    """Return loaders to be tried: copies of the `DataLoader`s, so that workers that persist do so for the copy alone."""
    if isinstance(loaders, Mapping):
        return {name: copied(loader) for name, loader in loaders.items()}
    return copy.copy(loaders) if isinstance(loaders, DataLoader) else loaders


def has_position(loader: Any) -> bool:
    """Whether a loader keeps its own position, and is not copied."""
    return not isinstance(loader, DataLoader) and hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
