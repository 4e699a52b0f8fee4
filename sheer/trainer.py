"""`Trainer`: what a user declares. It builds the settings, and hands everything on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Never

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from sheer.build import resolve_device
from sheer.console import Console
from sheer.distributed.world import world
from sheer.distributed.wrap import Parallelize
from sheer.errors import SettingsError
from sheer.evaluate_alone import Reporter, evaluate_alone, predict_alone
from sheer.launch import take_overrides
from sheer.loggers.base import Logger
from sheer.loop import fit
from sheer.loss import Step
from sheer.own_loop import Loop, start_loop
from sheer.plugins import Plugins
from sheer.run import Result, result_of
from sheer.settings import (
    Checkpoint,
    ClipAlgorithm,
    Compile,
    CompileMode,
    MonitorMode,
    NonFinite,
    Parallel,
    Parallelism,
    Precision,
    Rollback,
    SchedulerInterval,
    Settings,
    expanded,
    mesh_of,
    overridden,
    seconds,
    unknown_name,
)


class Trainer:
    """Trains, validates, tests and predicts. What each argument means is in docs/settings.md; all have a default but the duration.

    Example:
        trainer = sheer.Trainer(max_epochs=10, monitor="val/loss")
        result = trainer.fit(model, step, train_loader, val_loader, optimizer=optimizer)
    """

    def __init__(
        self,
        *,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        max_time: float | str | timedelta | None = None,
        device: str = "auto",
        precision: Precision = "32-true",
        parallel: Parallelism | Parallel | DeviceMesh = "auto",
        compile: bool | CompileMode | Compile = False,
        cuda_graph: bool = False,
        autotune: bool = False,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: ClipAlgorithm = "norm",
        accumulate_grad_batches: int = 1,
        micro_batch_size: int | None = None,
        scheduler_interval: SchedulerInterval = "step",
        nonfinite: NonFinite | Rollback = "raise",
        log_every_n_steps: int = 50,
        validate_every_n_steps: int | None = None,
        validate_first: bool = False,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        overfit_batches: int = 0,
        fast_dev_run: bool | int = False,
        monitor: str | None = None,
        monitor_mode: MonitorMode = "min",
        deterministic: bool = False,
        detect_anomaly: bool = False,
        checkpoint: Checkpoint | bool | None = True,
        callbacks: Sequence[object] = (),
        loggers: Sequence[Logger | Console] = (),
        hparams: Any = None,
        run_dir: str | Path | None = None,
        resume: str | Path | None = None,
        **unknown: Never,
    ) -> None:
        for name in unknown:
            if name == "activation_memory_budget":
                raise SettingsError(
                    "Trainer has no 'activation_memory_budget'. Give it to the compiler: compile=sheer.Compile(activation_memory_budget=...)."
                )
            raise unknown_name(
                name,
                [*(f.name for f in dataclasses.fields(Settings)), "callbacks", "loggers", "hparams"],
                "Trainer",
            )
        if isinstance(max_time, (str, timedelta)):
            max_time = seconds(max_time) if isinstance(max_time, str) else max_time.total_seconds()
        settings = Settings(
            max_steps=max_steps,
            max_epochs=max_epochs,
            max_time=max_time,
            device=device,
            precision=precision,
            parallel=Parallel(mesh=parallel) if isinstance(parallel, DeviceMesh) else parallel,
            compile=(compile.mode or True) if isinstance(compile, Compile) else compile,
            activation_memory_budget=compile.activation_memory_budget if isinstance(compile, Compile) else 1.0,
            cuda_graph=cuda_graph,
            autotune=autotune,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
            accumulate_grad_batches=accumulate_grad_batches,
            micro_batch_size=micro_batch_size,
            scheduler_interval=scheduler_interval,
            nonfinite=nonfinite,
            log_every_n_steps=log_every_n_steps,
            validate_every_n_steps=validate_every_n_steps,
            validate_first=validate_first,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            overfit_batches=overfit_batches,
            fast_dev_run=fast_dev_run,
            monitor=monitor,
            monitor_mode=monitor_mode,
            deterministic=deterministic,
            detect_anomaly=detect_anomaly,
            checkpoint=Checkpoint() if checkpoint is True else checkpoint or None,
            run_dir=str(run_dir) if run_dir is not None else None,
            resume=str(resume) if resume is not None else None,
        )
        settings = overridden(settings, take_overrides())
        self.settings = expanded(settings, world().world_size)
        self.plugins = Plugins(callbacks, loggers, hparams, mesh_of(settings))
        self._reporter: Reporter | None = None
        self.run_dir = Path(self.settings.run_dir) if self.settings.run_dir is not None else None

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        *,
        callbacks: Sequence[object] = (),
        loggers: Sequence[Logger | Console] = (),
        hparams: Any = None,
    ) -> Trainer:
        """Make a trainer from settings that were written down, read from a file or built by a configuration library."""
        given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        budget = given.pop("activation_memory_budget")
        if budget < 1.0:
            given["compile"] = Compile(
                mode=None if settings.compile is True else settings.compile or None, activation_memory_budget=budget
            )
        return cls(**given, callbacks=callbacks, loggers=loggers, hparams=hparams)

    @property
    def device(self) -> torch.device:
        """Where models and batches are put."""
        return resolve_device(self.settings.device)

    @property
    def rank(self) -> int:
        """The number of this process among those that train together."""
        return world().rank

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return world().world_size

    def fit(
        self,
        model: nn.Module,
        step: Step,
        train_loader: Any,
        val_loader: Any = None,
        *,
        eval_step: Step | None = None,
        optimizer: Optimizer | Callable[[nn.Module], Optimizer],
        scheduler: Any = None,
        parallelize: Parallelize = None,
        resume_by_skipping: bool = False,
    ) -> Result:
        """Train a model, in place, and return how it ended.

        Args:
            model: the module to train; `step` gets this very object.
            step: a function of (model, batch), or (model, batch, step), that returns the loss, or a mapping with it under "loss" and
                other metrics: scalar tensors, numbers, `sheer.Mean`s, torchmetrics objects.
            train_loader: a DataLoader, a dict of them, or any iterable of batches; see docs/data.md.
            val_loader: what to validate on; a dict of loaders gives `val/<loader>/<name>`.
            eval_step: what to validate with, if not `step`: called in eval mode and without gradients.
            optimizer: an optimizer, or a function of the model that returns one.
            scheduler: a scheduler, or a function of (optimizer, total_steps) that returns one.
            parallelize: on several ranks, a plan for `tp`, as {"blocks.*.up": ColwiseParallel()}, or a function of (model, mesh) that divides
                the model by PyTorch's own calls; it may return the modules that `fully_shard` is to get each by itself.
            resume_by_skipping: allow a loader without a state to be resumed by reading and dropping what was used.

        Raises:
            SheerError: something does not fit together; found before the first step wherever it can be.
        """
        settings, plugins, loader = self.settings, self.plugins, train_loader
        if settings.autotune:
            from sheer.scripts import Call
            from sheer.speed.autotune import tuned

            call = Call(settings, plugins, model, step, train_loader, optimizer, scheduler, parallelize)
            settings, plugins, loader, optimizer = tuned(call)
        run = fit(
            settings,
            plugins,
            model,
            step,
            loader,
            val_loader,
            eval_step or step,
            optimizer,
            scheduler,
            parallelize,
            resume_by_skipping,
        )
        self.run_dir, self._reporter = run.info.run_dir, Reporter(run.loggers, run.info, run.progress, run.stepper)
        return result_of(run)

    def start(
        self,
        model: nn.Module,
        *,
        optimizers: Mapping[str, Any],
        schedulers: Mapping[str, Any] | None = None,
        total_steps: int | None = None,
        parallelize: Parallelize = None,
    ) -> Loop:
        """Start a run whose loop is written by you; see `sheer.Loop`.

        Args:
            model: the module to train; several networks are one module.
            optimizers: optimizers, or functions of the model, by the names their states are saved under.
            schedulers: schedulers, or functions of (optimizer, total_steps), by the names of their optimizers.
            total_steps: how many steps the loop will make, for such functions; not needed where `max_steps` is set.
            parallelize: how the model is divided over ranks, as in `fit`.
        """
        run, state = start_loop(
            self.settings, self.plugins, model, optimizers, schedulers or {}, total_steps, parallelize
        )
        self.run_dir, self._reporter = run.info.run_dir, Reporter(run.loggers, run.info, run.progress, run.stepper)
        return Loop(self.settings, run, state)

    def validate(
        self,
        model: nn.Module,
        step: Step,
        loader: Any,
        *,
        checkpoint: str | Path | None = None,
        limit_batches: int | float | None = None,
    ) -> dict[str, float]:
        """Return `val/<name>` for each metric of `step` over a loader; with `checkpoint` ("best", "last" or a path) of its weights, which the model keeps.

        After a `fit` of this trainer its loggers get them too, at the run's last step.
        """
        return evaluate_alone(
            self.settings,
            self.plugins,
            model,
            step,
            loader,
            "val/",
            checkpoint,
            self.run_dir,
            self._reporter,
            limit_batches,
        )

    def test(
        self,
        model: nn.Module,
        step: Step,
        loader: Any,
        *,
        checkpoint: str | Path | None = None,
        limit_batches: int | float | None = None,
    ) -> dict[str, float]:
        """Return `test/<name>` for each metric of `step` over a loader; with `checkpoint` ("best", "last" or a path) of its weights, which the model keeps.

        After a `fit` of this trainer its loggers get them too, at the run's last step.
        """
        return evaluate_alone(
            self.settings,
            self.plugins,
            model,
            step,
            loader,
            "test/",
            checkpoint,
            self.run_dir,
            self._reporter,
            limit_batches,
        )

    def predict(
        self,
        model: nn.Module,
        step: Step,
        loader: Any,
        *,
        checkpoint: str | Path | None = None,
        limit_batches: int | float | None = None,
    ) -> Iterator[Any]:
        """Yield what `step` returns for each batch, in eval mode and without gradients, as it comes."""
        return predict_alone(
            self.settings, self.plugins, model, step, loader, checkpoint, self.run_dir, self._reporter, limit_batches
        )
