"""Runs that are logged: whole, and stopped by a signal and resumed; and the start of one, for loggers on their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

import sheer
from sheer.events import RunInfo
from tests.task import loader, model, step, trainer
from tests.test_resume import StopAt

HPARAMS = {"lr": 0.01, "layers": [6, 16, 1], "data": {"samples": 100, "shuffle": True}}


class Broken:
    """Raises at the end of the first step."""

    def on_step_end(self, step: int, model: torch.nn.Module) -> None:
        raise RuntimeError("out of luck")


def info(run_dir: str = "run", *, run_id: str = "run-1", start_step: int = 0, **other: Any) -> RunInfo:
    """What a logger is told when a run starts in `run_dir`."""
    Path(run_dir).mkdir(exist_ok=True)
    return RunInfo(
        run_id=run_id,
        run_dir=Path(run_dir),
        device=torch.device("cpu"),
        start_step=start_step,
        total_steps=20,
        steps_per_epoch=10,
        log_every_n_steps=1,
        monitor="val/loss",
        monitor_mode="min",
        hparams=HPARAMS,
        settings={"max_steps": 20, "monitor": "val/loss"},
        **other,
    )


def fit(folder: str, *loggers: Any, stop_at: int | None = None, callbacks: Sequence[Any] = (), **settings: Any) -> None:
    """Train 21 steps of 3 epochs in `folder`, with new objects; `stop_at` a step the process is told to stop, and would leave."""
    sheer.seed_everything(0)
    net = model()
    made = trainer(
        run_dir=folder,
        resume="auto",
        log_every_n_steps=2,
        checkpoint=True,
        monitor="val/loss",
        hparams=HPARAMS,
        loggers=[sheer.Console(live=False), *loggers],
        callbacks=[StopAt(stop_at)] if stop_at is not None else callbacks,
        **settings,
    )
    arguments = (net, step, loader(), loader(32, shuffle=False))
    optimizer = AdamW(net.parameters(), lr=1e-2)
    if stop_at is None:
        made.fit(*arguments, optimizer=optimizer)
    else:
        with pytest.raises(SystemExit):
            made.fit(*arguments, optimizer=optimizer)
