"""A run's checkpoints: what goes into one, and which are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sheer.checkpoint.codec import encode
from sheer.checkpoint.optimizer import optimizer_state
from sheer.checkpoint.store import committed, prune, ranked, write_checkpoint
from sheer.errors import NonFiniteError, RunError
from sheer.random import random_state
from sheer.run import Run, tensors_of
from sheer.settings import Settings


def save_checkpoint(cfg: Settings, run: Run) -> Path:
    """Write a checkpoint of the run as it is at the end of a step, and prune those that it makes superfluous."""
    if cfg.nonfinite == "raise":
        run.watch.check()
        check_weights(run.model, run.progress.step)
    tensors: dict[str, Tensor] = {}
    state = encode(state_of(run), tensors)
    trained, averages = tensors_of(run.model), run.averaging.averages() if run.averaging is not None else None
    groups = {"model": {**trained, **(averages or {})}, "state": tensors}
    if averages is not None:
        groups["training"] = trained  # "model" holds the averages, which are what is used
    extra = {name: value for name, value in run.model.state_dict().items() if not isinstance(value, Tensor)}
    texts = {"state": state, "extra": encode(extra, tensors, "extra")}
    measured = run.progress.metrics if run.progress.validated_at == run.progress.step else {}
    facts = {"run_id": run.info.run_id, "metrics": encode(measured, {}), "settings": dict(run.info.settings)}
    try:
        path = write_checkpoint(run.checkpoints, run.progress.step, groups, texts, facts)
    except (OSError, SafetensorError) as error:
        older = ", ".join(saved.path.name for saved in committed(run.checkpoints)) or "none"
        raise RunError(
            f"The checkpoint of step {run.progress.step} could not be written to {run.checkpoints}: {error}. The older ones are as they were: {older}. "
            'Make room (Checkpoint(keep_last=..., keep_best=...) says how many stay), then go on with resume="auto".'
        ) from error
    keep_best = cfg.checkpoint.keep_best if cfg.checkpoint is not None else 0
    keep_last = cfg.checkpoint.keep_last if cfg.checkpoint is not None else 1
    step = run.progress.step
    prune(run.checkpoints, step, keep_last=keep_last, keep_best=keep_best, monitor=cfg.monitor, mode=cfg.monitor_mode)
    return path


def state_of(run: Run) -> dict[str, Any]:
    """Return all that a checkpoint holds besides the model's weights."""
    schedulers = run.schedulers | run.plateaus
    return {
        "progress": {**run.progress.state_dict(), "seconds": run.seconds},
        "scheduled_steps": run.scheduled_steps,
        "optimizers": {name: optimizer_state(o, run.model) for name, o in run.optimizers.items()},
        "schedulers": {name: scheduler.state_dict() for name, scheduler in schedulers.items()},
        "scheduler_classes": {name: type(scheduler).__name__ for name, scheduler in schedulers.items()},
        "scaler": run.scaler.state_dict() if run.scaler is not None else None,
        "metrics": run.metrics.state_dict(),
        "random": random_state(),
        "data": run.data.state_dict() if run.data is not None else None,
        "callbacks": {name: callback.state_dict() for name, callback in run.callbacks.items()},
        "loggers": run.loggers.state_dict(),
    }


def check_weights(model: nn.Module, step: int) -> None:
    """Raise `NonFiniteError` for a weight that became NaN or infinite though no loss has shown it yet. Waits for the device."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        return
    finite = torch.stack([parameter.detach().isfinite().all() for _, parameter in trained]).tolist()
    bad = [name for (name, _), good in zip(trained, finite, strict=True) if not good]
    if bad:
        raise NonFiniteError(
            f"{', '.join(bad[:3])}{f' and {len(bad) - 3} more' if len(bad) > 3 else ''} became NaN or infinite by step {step}, through a gradient: "
            "no loss was. This step is not saved. detect_anomaly=True names the operation (a square root or a norm of 0, most often), "
            'gradient_clip_val=1.0 names the step, nonfinite="skip" leaves such steps out.'
        )


def is_among_best(cfg: Settings, run: Run) -> bool:
    """Whether the metrics of the last validation belong to the best that are kept."""
    if (
        cfg.checkpoint is None
        or cfg.monitor is None
        or cfg.checkpoint.keep_best == 0
        or run.progress.validated_at != run.progress.step
    ):
        return False
    value = run.progress.metrics[cfg.monitor]
    saves = [saved for saved in committed(run.checkpoints) if saved.step < run.progress.step]  # later: see `prune`
    best = ranked(saves, cfg.monitor, cfg.monitor_mode)[: cfg.checkpoint.keep_best]
    if len(best) < cfg.checkpoint.keep_best:
        return value == value
    worst = best[-1].metrics[cfg.monitor]
    return value < worst if cfg.monitor_mode == "min" else value > worst
