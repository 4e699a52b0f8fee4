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
from sheer.checkpoint.store import read_manifest
from sheer.checks import check_can_be_saved, check_length_of_schedules, check_start
from sheer.compilation import compile_model
from sheer.console import Console, silent_console
from sheer.data.choose import check_loader, make_source, refuse_one_way
from sheer.data.feed import TrainingData
from sheer.distributed.agree import agreed, is_other_rank
from sheer.distributed.layers import check_sizes
from sheer.distributed.mesh import Ranks
from sheer.distributed.output import open_output
from sheer.distributed.stop import StopAgreement
from sheer.distributed.wrap import Parallelize, differ_in_random_numbers, divide, repeated_blocks, repoint
from sheer.errors import SettingsError
from sheer.evaluation import Compute, Evaluation, named_loaders
from sheer.events import RunInfo, events_of, named
from sheer.float8 import use_float8
from sheer.loggers.base import Loggers, check_loggers
from sheer.loggers.jsonl import JSONL
from sheer.plugins import Plugins
from sheer.progress import Progress
from sheer.random import state_before
from sheer.resume import find_checkpoint, forget_copies, refuse_other_run, restore
from sheer.run import Run
from sheer.rundir import as_mapping, choose_run_dir, run_record
from sheer.saving import folder_of_saves, saver_of
from sheer.settings import Rollback, Settings
from sheer.trail import Trail


def training_data(
    cfg: Settings, compute: Compute, ranks: Ranks | None, loader: Any, resume_by_skipping: bool = False
) -> TrainingData:
    """Return what the steps train on, as the settings limit and group it; on several ranks this one's part of it."""
    check_loader(loader, "The training loader", passes=cfg.max_epochs or 1)
    source = make_source(
        loader,
        seed=agreed(ranks, torch.initial_seed()),
        device=compute.device,
        resume_by_skipping=resume_by_skipping,
        same_epoch=cfg.overfit_batches > 0,
        ranks=ranks,
    )
    if isinstance(cfg.nonfinite, Rollback):
        refuse_one_way(source)
    return TrainingData(
        source,
        device=compute.device,
        dtype=compute.dtype,
        accumulate=cfg.accumulate_grad_batches,
        limit=cfg.overfit_batches or cfg.limit_train_batches,
        same_epoch=cfg.overfit_batches > 0,
        ranks=ranks,
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
    ranks: Ranks | None,
    model: nn.Module,
    parallelize: Parallelize,
    optimizers: Mapping[str, Optimizer | Callable[[nn.Module], Optimizer]],
    schedulers: Mapping[str, Any],
    data: TrainingData | None,
    planned_steps: int | None = None,
) -> tuple[Run, dict[str, Any] | None]:
    """Make a run out of what the user passed; where one is to be resumed, bring it to where its checkpoint was made.

    `planned_steps` is the number of steps of a loop whose data come later, where it is known. Where other ranks only wait for what
    rank 0 finds, an error of rank 0 is the only one, and ends them all.

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
    if cfg.precision == "float8-mixed":
        use_float8(model, compute.device)
    if ranks is None:
        stepper = None
        place_model(model, compute)
    else:
        if cfg.cuda_graph and compute.device.type == "cuda":  # what DDP makes belongs to the stream that it was made on
            torch.cuda.set_stream(torch.cuda.Stream(compute.device))
        named_before = {id(parameter): name for name, parameter in model.named_parameters()}
        if ranks.parallel.pp > 1 and data is not None:
            check_sizes(data.batch_size, data.samples_per_epoch, cfg.micro_batch_size, ranks)
        stepper = divide(
            model, ranks, parallelize, compute.dtype, cfg.precision, cfg.compile, len(optimizers), compute.autocast
        )
        repoint(optimizers, named_before, model)
        differ_in_random_numbers(ranks)
    steps = count_steps(cfg, data) if planned_steps is None else planned_steps
    built = {name: build_optimizer(model, given) for name, given in optimizers.items()}
    check_parameters(model, built)
    scheduled = {name: build_scheduler(s, built[name], steps) for name, s in schedulers.items() if s is not None}
    # As from_pretrained leaves it; parts that were set to eval by hand stay so in a model in train mode.
    if not model.training:
        model.train()
    if cfg.compile and (ranks is None or ranks.uses_ddp):
        compile_parts(cfg, model)
    if cfg.monitor is None and any(isinstance(s, ReduceLROnPlateau) for s in scheduled.values()):
        raise SettingsError(
            'ReduceLROnPlateau follows the monitored metric, and monitor is not set. Set monitor="val/loss", say.'
        )
    directory = agreed(ranks, Path() if is_other_rank(ranks) else folder_of(cfg))
    checkpoint = find_checkpoint(cfg, folder_of_saves(cfg, directory / "checkpoints", ranks), ranks)
    manifest = read_manifest(checkpoint) if checkpoint is not None else None
    run_id = manifest["run_id"] if manifest is not None and cfg.resume == "auto" else secrets.token_hex(4)
    record = agreed(
        ranks, {} if is_other_rank(ranks) else run_record(directory, cfg, hparams, torch.initial_seed(), run_id)
    )
    refuse_other_run(cfg, manifest, record["id"])
    if ranks is not None:
        open_output(directory, ranks.rank)
    parameters, progress = parameters_of(model, built), Progress()
    run = Run(
        model=model,
        optimizers=built,
        schedulers={name: s for name, s in scheduled.items() if not isinstance(s, ReduceLROnPlateau)},
        plateaus={name: s for name, s in scheduled.items() if isinstance(s, ReduceLROnPlateau)},
        scaler=torch.amp.GradScaler(compute.device.type) if cfg.precision == "16-mixed" else None,
        compute=compute,
        ranks=ranks,
        agreement=StopAgreement(progress, ranks.rank, ranks.world_size, timeout=ranks.parallel.timeout)
        if ranks is not None
        else None,
        stepper=stepper,
        parameters=parameters,
        unused=set(parameters),
        events=events,
        callbacks=named(plugins.callbacks),
        averaging=averaging_of(plugins),
        loggers=loggers_of(cfg, plugins, ranks),
        console=console_of(plugins, ranks),
        saver=saver_of(cfg, directory / "checkpoints", compute.device, ranks),
        rewind=state_before(compute.device),
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
            ranks=ranks,
        ),
        record=record,
        total_steps=steps,
        scheduled_steps=steps if are_made_here(schedulers) else None,
        data=data,
        progress=progress,
        trail=Trail(cfg.nonfinite.spike) if isinstance(cfg.nonfinite, Rollback) else None,
    )
    if cfg.activation_memory_budget < 1.0:
        run.compilations.budget = cfg.activation_memory_budget
    if run.scaler is not None:
        run.progress.scale = run.scaler.get_scale()
    run.saver.open(run.info.run_id, run.info.start_step)
    check_can_be_saved(run)
    state = restore(cfg, run, checkpoint, manifest or {}) if checkpoint is not None else None
    forget_copies(run, checkpoint)
    check_length_of_schedules(cfg, run)
    announce(cfg, run, checkpoint)
    return run, state


def averaging_of(plugins: Plugins) -> Any | None:
    """Return the callback whose averages evaluation uses, if there is one."""
    return next((callback for callback in plugins.callbacks if hasattr(callback, "averages")), None)


def are_made_here(schedulers: Mapping[str, Any]) -> bool:
    """Whether a scheduler is made by a function that gets the number of steps."""
    return any(built_by_function(scheduler) for scheduler in schedulers.values())


def folder_of(cfg: Settings) -> Path:
    """Return the folder of a run; a run that keeps nothing gets one that is none of its user's."""
    return Path(tempfile.mkdtemp(prefix="dev-run-")) if cfg.fast_dev_run else choose_run_dir(cfg)


def loggers_of(cfg: Settings, plugins: Plugins, ranks: Ranks | None) -> Loggers:
    """Return all loggers of a run, on rank 0; the console is told by itself."""
    others = [logger for logger in plugins.loggers if not isinstance(logger, Console)]
    return Loggers([] if cfg.fast_dev_run or is_other_rank(ranks) else [JSONL(), *others])


def console_of(plugins: Plugins, ranks: Ranks | None) -> Console:
    """Return the console that was given, or one of our own; on other ranks than the first one that shows nothing."""
    given = [logger for logger in plugins.loggers if isinstance(logger, Console)]
    if is_other_rank(ranks):
        return silent_console()
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


def compile_parts(cfg: Settings, model: nn.Module) -> None:
    """Compile a model, or its repeated blocks each by itself."""
    if cfg.compile == "blocks":
        for block in blocks_to_compile(model):
            compile_model(block, None)
    else:
        compile_model(model, None if cfg.compile is True else str(cfg.compile))


def blocks_to_compile(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model, which are compiled each by itself, and once for all of one kind.

    Raises:
        SettingsError: it has none.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise SettingsError(
            'compile="blocks" compiles the members of an nn.ModuleList or nn.Sequential that come several times, and this model has none. Set '
            "compile=True."
        )
    return blocks


def set_backends(cfg: Settings) -> None:
    """Set what is global in PyTorch: determinism, anomaly detection, TF32. As in a script, it stays set."""
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
        torch.use_deterministic_algorithms(True)
    if cfg.detect_anomaly:
        torch.autograd.set_detect_anomaly(True)
    if cfg.precision == "tf32-true":
        torch.set_float32_matmul_precision("high")
