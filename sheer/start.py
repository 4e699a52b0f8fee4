"""The start of a run: everything is checked, built, restored and said before the first step costs any time."""

from __future__ import annotations

import dataclasses
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sheer.announce import announce
from sheer.build import (
    build_optimizer,
    build_scheduler,
    built_by_function,
    check_parameters,
    parameters_of,
    place_model,
    takes_step_number,
)
from sheer.checkpoint.store import read_text
from sheer.checks import check_can_be_saved, check_length_of_schedules, check_start
from sheer.console import Console
from sheer.data.choose import check_loader, make_source
from sheer.data.feed import TrainingData
from sheer.errors import SettingsError
from sheer.evaluation import Compute, Evaluation, named_loaders
from sheer.events import RunInfo, events_of, named
from sheer.loggers.base import Loggers, check_loggers
from sheer.loggers.jsonl import JSONL
from sheer.plugins import Plugins
from sheer.resume import find_checkpoint, restore
from sheer.run import Run
from sheer.rundir import as_mapping, choose_run_dir, run_record
from sheer.settings import Settings


def training_data(cfg: Settings, compute: Compute, loader: Any, resume_by_skipping: bool = False) -> TrainingData:
    """Return what the steps train on, as the settings limit and group it."""
    check_loader(loader, "The training loader", passes=cfg.max_epochs or 1)
    source = make_source(
        loader,
        seed=torch.initial_seed(),
        device=compute.device,
        resume_by_skipping=resume_by_skipping,
        same_epoch=cfg.overfit_batches > 0,
    )
    return TrainingData(
        source,
        device=compute.device,
        dtype=compute.dtype,
        accumulate=cfg.accumulate_grad_batches,
        limit=cfg.overfit_batches or cfg.limit_train_batches,
        same_epoch=cfg.overfit_batches > 0,
    )


def count_steps(cfg: Settings, data: TrainingData | None) -> int | None:
    """Return the number of steps of the whole run, or None where only time, or the end of the data, tells."""
    if cfg.max_epochs is None or data is None or data.steps_per_epoch is None:
        return cfg.max_steps
    by_epochs = cfg.max_epochs * data.steps_per_epoch
    return by_epochs if cfg.max_steps is None else min(cfg.max_steps, by_epochs)


def start_run(
    cfg: Settings,
    plugins: Plugins,
    compute: Compute,
    model: nn.Module,
    optimizers: Mapping[str, Optimizer | Callable[[nn.Module], Optimizer]],
    schedulers: Mapping[str, Any],
    data: TrainingData | None,
    planned_steps: int | None = None,
) -> tuple[Run, dict[str, Any] | None]:
    """Make a run out of what the user passed; where one is to be resumed, bring it to where its checkpoint was made.

    `planned_steps` is the number of steps of a loop whose data come later, where it is known.

    Returns:
        the run, and the states of the data and the random numbers where it goes on; None in a new one.

    Raises:
        SettingsError, ModelError, RunError: something does not fit; the message says what, and what to do.
    """
    events = events_of(plugins.callbacks)
    check_loggers(plugins.loggers)
    check_start(cfg, plugins, model)
    hparams = as_mapping(plugins.hparams)
    set_backends(cfg)
    place_model(model, compute)
    steps = count_steps(cfg, data) if planned_steps is None else planned_steps
    built = {name: build_optimizer(model, given) for name, given in optimizers.items()}
    check_parameters(model, built)
    scheduled = {name: build_scheduler(s, built[name], steps) for name, s in schedulers.items() if s is not None}
    # As from_pretrained leaves it; parts that were set to eval by hand stay so in a model in train mode.
    if not model.training:
        model.train()
    if cfg.compile:
        model.compile(mode=None if cfg.compile is True else cfg.compile)
    if cfg.monitor is None and any(isinstance(s, ReduceLROnPlateau) for s in scheduled.values()):
        raise SettingsError(
            'ReduceLROnPlateau follows the monitored metric, and monitor is not set. Set monitor="val/loss", say.'
        )
    directory = Path(tempfile.mkdtemp(prefix="dev-run-")) if cfg.fast_dev_run else choose_run_dir(cfg)
    checkpoint = find_checkpoint(cfg, directory / "checkpoints")
    manifest = read_text(checkpoint, "manifest") if checkpoint is not None else None
    run_id = manifest["run_id"] if manifest is not None and cfg.resume == "auto" else secrets.token_hex(4)
    record = run_record(directory, cfg, hparams, torch.initial_seed(), run_id)
    parameters = parameters_of(model, built)
    run = Run(
        model=model,
        optimizers=built,
        schedulers={name: s for name, s in scheduled.items() if not isinstance(s, ReduceLROnPlateau)},
        plateaus={name: s for name, s in scheduled.items() if isinstance(s, ReduceLROnPlateau)},
        scaler=torch.amp.GradScaler(compute.device.type) if cfg.precision == "16-mixed" else None,
        compute=compute,
        parameters=parameters,
        unused=set(parameters),
        events=events,
        callbacks=named(plugins.callbacks),
        averaging=averaging_of(plugins),
        loggers=loggers_of(cfg, plugins),
        console=console_of(plugins),
        info=RunInfo(
            run_id=record["id"],
            run_dir=directory,
            device=compute.device,
            start_step=manifest["step"] if manifest is not None else 0,
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
        scheduled_steps=steps if are_made_here(schedulers) else None,
        data=data,
    )
    if run.scaler is not None:
        run.progress.scale = run.scaler.get_scale()
    check_can_be_saved(run)
    state = restore(cfg, run, checkpoint) if checkpoint is not None else None
    check_length_of_schedules(cfg, run)
    announce(cfg, run, checkpoint)
    return run, state


def averaging_of(plugins: Plugins) -> Any | None:
    """Return the callback whose averages evaluation uses, if there is one."""
    return next((callback for callback in plugins.callbacks if hasattr(callback, "averages")), None)


def are_made_here(schedulers: Mapping[str, Any]) -> bool:
    """Whether a scheduler is made by a function that gets the number of steps."""
    return any(built_by_function(scheduler) for scheduler in schedulers.values())


def loggers_of(cfg: Settings, plugins: Plugins) -> Loggers:
    """Return all loggers of a run; the console is told by itself."""
    others = [logger for logger in plugins.loggers if not isinstance(logger, Console)]
    return Loggers([] if cfg.fast_dev_run else [JSONL(), *others])


def console_of(plugins: Plugins) -> Console:
    """Return the console that was given, or one of our own."""
    given = [logger for logger in plugins.loggers if isinstance(logger, Console)]
    return given[0] if given else Console()


def evaluation_of(
    cfg: Settings, model: nn.Module, step: Callable[..., Any], loaders: Any, *, prefix: str = "val/"
) -> Evaluation | None:
    """Return what a validation does, or None where there is nothing to validate on."""
    if loaders is None or cfg.limit_val_batches == 0:
        return None
    numbered = takes_step_number(step, "eval_step", model)
    for _, loader in named_loaders(loaders):
        check_loader(loader, "The loader to validate on", passes=2)  # a first batch is tried before the first step
    return Evaluation(step, loaders, prefix, cfg.limit_val_batches, numbered)


def set_backends(cfg: Settings) -> None:
    """Set what is global in PyTorch: determinism, anomaly detection, TF32. As in a script, it stays set."""
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
        torch.use_deterministic_algorithms(True)
    if cfg.detect_anomaly:
        torch.autograd.set_detect_anomaly(True)
    if cfg.precision == "tf32-true":
        torch.set_float32_matmul_precision("high")
