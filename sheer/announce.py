"""The lines at the start of a run that say what was decided."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sheer.console import clock
from sheer.data.order import share
from sheer.distributed.agree import gathered
from sheer.distributed.given import is_divided
from sheer.distributed.mesh import Ranks, sizes_of
from sheer.distributed.wrap import StepModule, count_sharded
from sheer.due import DURATIONS
from sheer.float8 import describe_float8
from sheer.run import Run
from sheer.settings import DIMENSIONS, Rollback, Settings
from sheer.version import __version__


def announce(cfg: Settings, run: Run, checkpoint: Path | None) -> None:
    """Say in a few lines what was decided."""
    say, (count, trained) = run.console.say, counts_of(run)
    frozen = f", {count - trained:,} of them frozen" if trained < count else ""
    say(f"sheer {__version__} · torch {torch.__version__} · {describe_device(run.compute.device)} · {cfg.precision}")
    say(f"model: {type(run.model).__name__}, {count:,} parameters{frozen}")
    if cfg.precision == "float8-mixed":
        say(describe_float8(run.model))
    if run.ranks is not None:
        announce_ranks(run, run.ranks)
    announce_data(cfg, run)
    if (cfg.nonfinite == "skip" or run.scaler is not None) and not cfg.cuda_graph:
        say("the host waits for the device once a step, to see whether the gradients are finite")
    if isinstance(cfg.nonfinite, Rollback):
        say(describe_rollback(cfg))
    say(
        f"run: {run.info.run_dir}"
        + (" (fast_dev_run: nothing is resumed or kept)" if cfg.fast_dev_run else f" (id {run.info.run_id})")
    )
    if checkpoint is not None:
        place = f"{run.saver.disk}/{checkpoint.name}" if cfg.resume == "auto" else checkpoint
        say(f"resumed from {place}, at step {run.progress.step:,}")
    if run.progress.micro_batch_size is not None:
        say(f"micro-batches of at most {run.progress.micro_batch_size}, since memory ran out before")
    if run.progress.stopped_by is not None:
        more = "; to go on, give it a longer duration" if run.progress.stopped_by in DURATIONS else ""
        say(f"the run is over ({run.progress.stopped_by}), so nothing is trained{more}")


def describe_rollback(cfg: Settings) -> str:
    """Say what makes the run go back, and how often."""
    assert isinstance(cfg.nonfinite, Rollback)
    bad = "a NaN or an infinity"
    if cfg.nonfinite.spike is not None:
        bad = f"a NaN, an infinity or a loss above {cfg.nonfinite.spike:g} times the median"
    times = f"{cfg.nonfinite.max_times} time{'s' if cfg.nonfinite.max_times > 1 else ''}"
    return f"rollback: {bad} leads back to the last good checkpoint, at most {times}"


def counts_of(run: Run) -> tuple[int, int]:
    """Return how many parameters the model has, and how many of them are trained; all stages counted."""
    parameters = list(run.model.parameters())
    counts = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    if run.ranks is None or run.ranks.parallel.pp == 1:
        return counts
    stages = gathered(counts if run.ranks.leads else (0, 0))
    return sum(count for count, _ in stages), sum(trained for _, trained in stages)


def announce_ranks(run: Run, ranks: Ranks) -> None:
    """Say how the ranks are used, and what is not as on one."""
    sizes = [f"{name}={size}" for name, size in zip(DIMENSIONS, sizes_of(ranks.parallel), strict=True) if size > 1]
    how = "DDP" if ranks.uses_ddp and ranks.parallel.cp == 1 else ", ".join(sizes)
    if type(run.stepper) is StepModule and is_divided(run.model):
        how = "divided by its user"
    shares = ranks.parallel.dp_shard * ranks.parallel.cp > 1
    shards = f"; {count_sharded(run.stepper)} modules sharded each by itself" if shares and not ranks.uses_ddp else ""
    run.console.say(f"ranks: {ranks.world_size} ({how}){shards}")
    local_norms = [m for m in run.model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    if local_norms and ranks.data_ranks > 1:
        run.console.say(
            f"batch norm: {len(local_norms)} modules see each rank's part of the batch alone; torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) makes them see all"
        )


def announce_data(cfg: Settings, run: Run) -> None:
    """Say what is trained on, how long, and how a batch is divided."""
    if run.data is not None:
        shared = "; each rank takes its part of every batch" if run.ranks is not None and run.data.source.shared else ""
        run.console.say(f"data: {run.data.described}{shared}{describe_length(cfg, run)}")
        if run.data.batch_size is not None and (run.ranks is not None or cfg.micro_batch_size is not None):
            data_ranks = run.ranks.data_ranks if run.ranks is not None else 1
            sentence = describe_batch(
                run.data.batch_size, cfg.accumulate_grad_batches, data_ranks, cfg.micro_batch_size
            )
            run.console.say(f"batch: {sentence}")


def describe_batch(batch_size: int, accumulate: int, data_ranks: int, micro_batch_size: int | None) -> str:
    """Say how the samples of a step are divided: `64 = 4 ranks x 8 x 2 micro-batches`."""
    largest, smallest = share(batch_size, 0, data_ranks)[1], share(batch_size, data_ranks - 1, data_ranks)[1]
    of_rank = f"{largest}" if largest == smallest else f"{smallest} or {largest}"
    parts = accumulate
    if micro_batch_size is not None and micro_batch_size < largest:
        parts = accumulate * -(-largest // micro_batch_size)
        of_rank = f"{micro_batch_size}" if largest % micro_batch_size == 0 else f"at most {micro_batch_size}"
    ranks = f"{data_ranks} rank{'s' if data_ranks > 1 else ''}"
    return f"{batch_size * accumulate} = {ranks} x {of_rank}" + (f" x {parts} micro-batches" if parts > 1 else "")


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
