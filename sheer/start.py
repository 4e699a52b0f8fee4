"""The start of a run: everything is checked, built, restored and said before the first step costs any time."""

from __future__ import annotations

import dataclasses
import difflib
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from sheer.build import (
    build_optimizer,
    build_scheduler,
    check_parameters,
    make_compute,
    place_model,
    resolve_device,
    takes_step_number,
)
from sheer.checkpoint import store
from sheer.checkpoint.codec import encode
from sheer.console import Console, clock
from sheer.data.feed import TrainingData
from sheer.data.source import check_loader, generators_of, make_source
from sheer.errors import ModelError, RunError, SettingsError, SheerWarning
from sheer.evaluation import Evaluation, evaluate, named_loaders
from sheer.events import Follows, RunInfo, events_of, named
from sheer.loggers.base import Logger, Loggers, check_loggers
from sheer.loggers.jsonl import JSONL
from sheer.random import random_state, set_random_state
from sheer.run import Run
from sheer.rundir import as_mapping, choose_run_dir, refuse_differences, run_record
from sheer.saving import checkpoint_in, newest_good, restore
from sheer.settings import Settings
from sheer.signals import is_signal
from sheer.version import __version__


@dataclass(frozen=True)
class Plugins:
    """What a trainer holds besides its settings: objects, which cannot be written down."""

    callbacks: Sequence[object] = ()
    loggers: Sequence[Logger | Console] = ()
    hparams: Any = None


def training_data(cfg: Settings, loader: Any, *, resume_by_skipping: bool = False) -> TrainingData:
    """Return what the steps train on, as the settings limit and group it."""
    compute = make_compute(cfg.precision, resolve_device(cfg.device))
    check_loader(loader, "The training loader", passes=cfg.max_epochs or 1)
    source = make_source(
        loader, seed=torch.initial_seed(), device=compute.device, resume_by_skipping=resume_by_skipping
    )
    return TrainingData(
        source,
        device=compute.device,
        dtype=compute.dtype,
        accumulate=cfg.accumulate_grad_batches,
        limit=cfg.overfit_batches or cfg.limit_train_batches,
        same_epoch=cfg.overfit_batches > 0,
    )


def total_steps(cfg: Settings, data: TrainingData | None) -> int | None:
    """Return the number of steps of the whole run, or None where only time, or the end of the data, tells."""
    by_epochs = None
    if cfg.max_epochs is not None and data is not None and data.steps_per_epoch is not None:
        by_epochs = cfg.max_epochs * data.steps_per_epoch
    known = [number for number in (cfg.max_steps, by_epochs) if number is not None]
    return min(known) if known else None


def start(
    cfg: Settings,
    plugins: Plugins,
    model: nn.Module,
    optimizers: Mapping[str, Optimizer | Callable[[nn.Module], Optimizer]],
    schedulers: Mapping[str, Any],
    data: TrainingData | None,
    numbered: tuple[Callable[..., Any], ...] = (),
) -> Run:
    """Make a run out of what the user passed; where one is to be resumed, bring it to where its checkpoint was made.

    Raises:
        SettingsError, ModelError, RunError: something does not fit; the message says what, and what to do.
    """
    events = events_of(plugins.callbacks)
    check_loggers(plugins.loggers)
    check_start(cfg, plugins, model)
    hparams = as_mapping(plugins.hparams)
    compute = make_compute(cfg.precision, resolve_device(cfg.device))
    set_backends(cfg)
    place_model(model, compute)
    steps = total_steps(cfg, data)
    built = {name: build_optimizer(model, optimizer) for name, optimizer in optimizers.items()}
    parameters = check_parameters(model, built)
    scheduled = {name: build_scheduler(s, built[name], steps) for name, s in schedulers.items() if s is not None}
    if (
        not model.training
    ):  # as from_pretrained leaves it; parts that were set to eval by hand stay so in a model in train mode
        model.train()
    if cfg.compile:
        model.compile(mode=None if cfg.compile is True else cfg.compile)
    if cfg.monitor is None and any(isinstance(s, ReduceLROnPlateau) for s in scheduled.values()):
        raise SettingsError(
            'ReduceLROnPlateau follows the monitored metric, and monitor is not set. Set monitor="val/loss", say.'
        )
    directory = Path(tempfile.mkdtemp(prefix="sheer-dev-run-")) if cfg.fast_dev_run else choose_run_dir(cfg)
    record = run_record(directory, cfg, hparams, torch.initial_seed())
    run = Run(
        model=model,
        optimizers=built,
        schedulers={name: s for name, s in scheduled.items() if not isinstance(s, ReduceLROnPlateau)},
        plateaus={name: s for name, s in scheduled.items() if isinstance(s, ReduceLROnPlateau)},
        scaler=torch.amp.GradScaler(compute.device.type) if cfg.precision == "16-mixed" else None,
        compute=compute,
        numbered=numbered,
        parameters=parameters,
        events=events,
        callbacks=named(plugins.callbacks),
        averaging=next((callback for callback in plugins.callbacks if hasattr(callback, "averages")), None),
        loggers=Loggers(
            [] if cfg.fast_dev_run else [JSONL(), *(x for x in plugins.loggers if not isinstance(x, Console))]
        ),
        console=next((logger for logger in plugins.loggers if isinstance(logger, Console)), None) or Console(),
        info=RunInfo(
            run_id=record["id"],
            run_dir=directory,
            device=compute.device,
            start_step=0,
            total_steps=steps,
            steps_per_epoch=data.steps_per_epoch if data is not None else None,
            log_every_n_steps=cfg.log_every_n_steps,
            monitor=cfg.monitor,
            monitor_mode=cfg.monitor_mode,
            hparams=hparams,
            settings=dataclasses.asdict(cfg),
        ),
        record=record,
        total_steps=steps,
        data=data,
    )
    encode(run.state_dict(), {})  # what cannot be saved is refused now, not at the first save
    resume(cfg, run)
    check_length_of_schedules(cfg, run)
    announce(cfg, run)
    return run


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
            stacklevel=4,
        )


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
    states, buffers = random_state(), {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    generators = [g for _, loader in named_loaders(validation.loaders) for g in generators_of(loader)]
    drawn_from = [generator.get_state() for generator in generators]
    metrics, _ = evaluate(
        run.model, dataclasses.replace(validation, limit=1), run.compute, run.events, run.progress.step
    )
    set_random_state(states)
    for generator, state in zip(generators, drawn_from, strict=True):
        generator.set_state(state)
    with torch.no_grad():
        for name, buffer in run.model.named_buffers():
            buffer.copy_(buffers[name])
    check_monitor(cfg, run, metrics)


def numbered(model: nn.Module, *steps: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """Return those step functions that take the number of the step."""
    return tuple(step for step in steps if takes_step_number(step, model=model))


def evaluation_of(
    cfg: Settings, model: nn.Module, step: Callable[..., Any], loaders: Any, *, prefix: str = "val"
) -> Evaluation | None:
    """Return what a validation does, or None where there is nothing to validate on."""
    if loaders is None or cfg.limit_val_batches == 0:
        return None
    numbered = takes_step_number(step, "eval_step", model)
    for _, loader in named_loaders(loaders):
        check_loader(loader, "The loader to validate on", passes=2)  # a first batch is tried before the first step
    return Evaluation(step, loaders, prefix, cfg.limit_val_batches, numbered)


def duration_over(cfg: Settings, run: Run) -> str | None:
    """Return which of the run's durations is over, or None."""
    if cfg.max_epochs is not None and run.progress.epoch >= cfg.max_epochs:
        return "max_epochs"
    if cfg.max_steps is not None and run.progress.step >= cfg.max_steps:
        return "max_steps"
    if cfg.max_time is not None and run.seconds >= cfg.max_time:
        return "max_time"
    return None


def set_backends(cfg: Settings) -> None:
    """Set what is global in PyTorch: determinism, anomaly detection, TF32. As in a script, it stays set."""
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
        torch.use_deterministic_algorithms(True)
    if cfg.detect_anomaly:
        torch.autograd.set_detect_anomaly(True)
    if cfg.precision == "tf32-true":
        torch.set_float32_matmul_precision("high")


def resume(cfg: Settings, run: Run) -> None:
    """Restore the checkpoint that `resume` means, if it means one and there is one."""
    if cfg.resume is None:
        return
    if cfg.resume == "auto":
        path = newest_good(run.checkpoints)
        if path is None and store.committed(run.checkpoints):
            raise RunError(
                f"No checkpoint in {run.checkpoints} can be used; see the warnings. To start anew, give another run_dir."
            )
        if path is None:
            return
    else:
        path = checkpoint_in(cfg.resume)
        refuse_differences(path, store.verify(path)["settings"], dataclasses.asdict(cfg))
    restore(run, path, same_run=cfg.resume == "auto")
    reason = run.progress.stopped_by
    if is_signal(reason) or reason in ("max_steps", "max_epochs", "max_time"):
        run.progress.stopped_by = duration_over(cfg, run)  # the durations may have grown since
    run.info = dataclasses.replace(run.info, start_step=run.progress.step)
    run.console.say(f"resumed from {path}, at step {run.progress.step:,}")


def announce(cfg: Settings, run: Run) -> None:
    """Say in a few lines what was decided."""
    say, parameters = run.console.say, list(run.model.parameters())
    count, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    frozen = f", {count - trained:,} of them frozen" if trained < count else ""
    say(f"sheer {__version__} · torch {torch.__version__} · {describe_device(run.compute.device)} · {cfg.precision}")
    say(f"model: {type(run.model).__name__}, {count:,} parameters{frozen}")
    if run.data is not None:
        say(f"data: {run.data.described}{length(cfg, run)}")
    if cfg.nonfinite == "skip" or run.scaler is not None:
        say("the host waits for the device once a step, to see whether the gradients are finite")
    say(f"run: {run.info.run_dir}" + ("" if cfg.fast_dev_run else f" (id {run.info.run_id})"))


def length(cfg: Settings, run: Run) -> str:
    """Say how long the run is, as far as it is known."""
    known = [f"{run.total_steps:,} steps"] if run.total_steps is not None else []
    if run.data is not None and run.data.steps_per_epoch is not None:
        known.append(f"{run.data.steps_per_epoch:,} an epoch")
    if cfg.max_time is not None:
        known.append(f"at most {clock(cfg.max_time)}")
    return f"; {', '.join(known)}" if known else ""


def describe_device(device: torch.device) -> str:
    """Say a device with its name."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
