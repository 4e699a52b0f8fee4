"""The lines at the start of a run that say what was decided."""

from __future__ import annotations

from pathlib import Path

import torch

from sheer.console import clock
from sheer.due import DURATIONS
from sheer.run import Run
from sheer.settings import Settings
from sheer.version import __version__


def announce(cfg: Settings, run: Run, checkpoint: Path | None) -> None:
    """Say in a few lines what was decided."""
    say, parameters = run.console.say, list(run.model.parameters())
    count, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    frozen = f", {count - trained:,} of them frozen" if trained < count else ""
    say(f"sheer {__version__} · torch {torch.__version__} · {describe_device(run.compute.device)} · {cfg.precision}")
    say(f"model: {type(run.model).__name__}, {count:,} parameters{frozen}")
    announce_data(cfg, run)
    if cfg.nonfinite == "skip" or run.scaler is not None:
        say("the host waits for the device once a step, to see whether the gradients are finite")
    say(f"run: {run.info.run_dir}" + ("" if cfg.fast_dev_run else f" (id {run.info.run_id})"))
    if checkpoint is not None:
        say(f"resumed from {checkpoint}, at step {run.progress.step:,}")
    if run.progress.stopped_by is not None:
        more = "; to go on, give it a longer duration" if run.progress.stopped_by in DURATIONS else ""
        say(f"the run is over ({run.progress.stopped_by}), so nothing is trained{more}")


def announce_data(cfg: Settings, run: Run) -> None:
    """Say what is trained on, and how long."""
    if run.data is not None:
        run.console.say(f"data: {run.data.described}{describe_length(cfg, run)}")


def describe_length(cfg: Settings, run: Run) -> str:
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
