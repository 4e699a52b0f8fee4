"""What of a run is saved, and when it is refused."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from sheer.checkpoint.bucket import Folder, folder_at, share_of_machine, url_of
from sheer.checkpoint.codec import encode
from sheer.checkpoint.disk import Disk
from sheer.checkpoint.layout import is_written_here, part_of
from sheer.checkpoint.optimizer import optimizer_state
from sheer.checkpoint.saver import Saver
from sheer.checkpoint.store import Content, Retention, ranked
from sheer.distributed.agree import agreed, gathered, is_other_rank
from sheer.distributed.buffers import same_buffers
from sheer.distributed.mesh import Ranks
from sheer.distributed.tensors import is_divided_tensor, local
from sheer.errors import BadStepsError, NonFiniteError, RunError
from sheer.memory import agree_on_parts
from sheer.random import random_state
from sheer.run import Run, tensors_of
from sheer.settings import Rollback, Settings
from sheer.speed.graph import settle_graphs


def saver_of(cfg: Settings, directory: Path, device: torch.device, ranks: Ranks | None) -> Saver:
    """Return what writes the checkpoints of a run into a folder."""
    keep = Retention() if cfg.checkpoint is None else retention(cfg)
    beside = cfg.checkpoint is not None and cfg.checkpoint.asynchronous
    rank, timeout = (0, 0.0) if ranks is None else (ranks.rank, ranks.parallel.timeout)
    return Saver(folder_of_saves(cfg, directory, ranks), keep, rank, device, beside=beside, timeout=timeout)


def folder_of_saves(cfg: Settings, directory: Path, ranks: Ranks | None) -> Folder:
    """Return where the checkpoints of a run are: in a folder of its own directory, or where the settings say."""
    place = cfg.checkpoint.directory if cfg.checkpoint is not None and not cfg.fast_dev_run else None
    if ranks is None:
        return Disk(directory) if place is None else folder_at(place, directory)
    if place is None or url_of(place) is None:
        return Disk(directory if place is None else Path(place), (ranks.rank, ranks.world_size))
    return folder_at(place, directory, ranks.rank, share_of_machine(ranks.rank, ranks.world_size))


def retention(cfg: Settings) -> Retention:
    """Return which checkpoints stay."""
    assert cfg.checkpoint is not None
    saves = cfg.checkpoint
    return Retention(saves.keep_last, saves.keep_best, saves.keep_every_n_steps, cfg.monitor, cfg.monitor_mode)


def save_checkpoint(cfg: Settings, run: Run, *, wait: bool) -> None:
    """Save the run as it is at the end of a step; return when it is copied, or, to `wait`, when the checkpoint is committed."""
    if cfg.cuda_graph:
        settle_graphs(run)
    if cfg.nonfinite == "raise":
        run.watch.check(run.ranks)
        check_weights(run.model, run.progress.step, run.ranks)
    if isinstance(cfg.nonfinite, Rollback):
        look_back(run)
    name = agreed(run.ranks, "" if is_other_rank(run.ranks) else run.saver.name_for(run.progress.step))
    if run.ranks is not None:
        agree_on_parts(run)
        same_buffers(run.model, run.ranks)  # so that a run that goes on has what one that was not stopped has
    run.saver.save(name, content_of(run), wait=wait)


def look_back(run: Run, *, weights: bool = True) -> None:
    """Look, in a run that may go back, whether a step since the last look was bad, or a weight is. Waits for the device.

    Raises:
        BadStepsError: one was; where only a weight tells, it is the last step.
    """
    assert run.trail is not None
    run.trail.check(run.watch, run.ranks, run.progress.losses)
    if weights:
        try:
            check_weights(run.model, run.progress.step, run.ranks)
        except NonFiniteError as error:
            step = run.progress.step
            raise BadStepsError(str(error), f"weights became NaN or infinite by step {step:,}", step, step) from None


def content_of(run: Run) -> Content:
    """Return what this rank adds to a checkpoint."""
    ranks, own = run.ranks, dict[str, Tensor]()
    groups, optimizers = groups_of(run)
    texts = {**encode(own_state_of(run), own), **({} if is_other_rank(ranks) else encode(state_of(run), own))}
    leads = ranks is None or ranks.leads
    if leads:
        extra = {name: value for name, value in run.model.state_dict().items() if not isinstance(value, Tensor)}
        texts |= {"optimizers": optimizers, "extra": encode(extra, own, "extra")}
    if ranks is not None:
        texts["role"] = ranks.role
    refuse_divided(own)
    parts = {g: {n: part for n, t in held.items() if (part := part_of(t)) is not None} for g, held in groups.items()}
    measured = run.progress.metrics if run.progress.validated_at == run.progress.step else {}
    return Content(
        step=run.progress.step,
        rank=0 if ranks is None else ranks.rank,
        world_size=1 if ranks is None else ranks.world_size,
        leads=leads,
        tensors={
            **{group: {name: local(t) for name, t in held.items()} for group, held in groups.items()},
            "state": own,
        },
        parts=parts,
        is_whole=ranks is None or (ranks.rank == 0 and ranks.parallel.pp == 1 and not any(parts.values())),
        texts={"state": texts},
        facts={
            "run_id": run.info.run_id,
            "metrics": encode(measured, {}),
            "settings": dict(run.info.settings),
        },
        logs=run.loggers.paths(),
    )


def groups_of(run: Run) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors of the model and of the optimizers that this rank writes, and all else that the optimizers hold, as JSON."""
    held: dict[str, Tensor] = {}
    optimizers = encode({name: optimizer_state(o, run.model) for name, o in run.optimizers.items()}, held)
    trained, averages = tensors_of(run.model), run.averaging.averages() if run.averaging is not None else None
    groups = {"model": {**trained, **(averages or {})}, "optimizer": held}
    if averages is not None:
        groups["training"] = trained  # "model" holds the averages, which are what is used
    written = {
        group: {n: t for n, t in all_.items() if is_written_here(t, run.ranks)} for group, all_ in groups.items()
    }
    return written, dict(optimizers)


def prepare_memory(cfg: Settings, run: Run) -> None:
    """Have the memory that states are copied into made beside training; called after the first update, which makes the optimizer's state."""
    saves = cfg.checkpoint
    if saves is None or not saves.asynchronous:
        return
    if saves.every_n_steps or saves.every_n_epochs or (saves.keep_best and cfg.monitor is not None):
        groups, _ = groups_of(run)
        run.saver.prepare({group: {name: local(t) for name, t in held.items()} for group, held in groups.items()})


def own_state_of(run: Run) -> dict[str, Any]:
    """Return what differs from rank to rank: random states, running metrics and, where a loader gives each rank its own data, its position."""
    return {
        "random": random_state(),
        "data": run.data.state_dict() if run.data is not None else None,
        "metrics": run.metrics.state_dict() if run.ranks is None or run.ranks.reports else {},
    }


def state_of(run: Run) -> dict[str, Any]:
    """Return what all ranks have alike, besides the model and its optimizers."""
    schedulers = run.schedulers | run.plateaus
    return {
        "progress": {**asdict(run.progress), "seconds": run.seconds},
        "scheduled_steps": run.scheduled_steps,
        "schedulers": {name: scheduler.state_dict() for name, scheduler in schedulers.items()},
        "scheduler_classes": {name: type(scheduler).__name__ for name, scheduler in schedulers.items()},
        "scaler": run.scaler.state_dict() if run.scaler is not None else None,
        "callbacks": {name: callback.state_dict() for name, callback in run.callbacks.items()},
        "loggers": run.loggers.state_dict(),
    }


def refuse_divided(tensors: dict[str, Tensor]) -> None:
    """Raise `RunError` for a tensor that is divided over ranks where only rank 0's value is saved."""
    for name, tensor in tensors.items():
        if is_divided_tensor(tensor):
            raise RunError(
                f"The state at {name!r} is a DTensor, and of callbacks and schedulers only what rank 0 has is saved. Let state_dict return "
                "tensor.full_tensor(), which all ranks call."
            )


def check_weights(model: nn.Module, step: int, ranks: Ranks | None) -> None:
    """Raise `NonFiniteError` for a weight that became NaN or infinite though no loss has shown it yet. Waits for the device."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        return
    tensors, bad = [local(parameter.detach()) for _, parameter in trained], list[str]()
    if not math.isfinite(get_total_norm(tensors).item()):  # reads each weight once; also where finite ones overflow
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).tolist()  # takes some ten times as long
        bad = [name for (name, _), good in zip(trained, finite, strict=True) if not good]
    if ranks is not None:
        bad = sorted({name for names in gathered(bad) for name in names})
    if bad:
        raise NonFiniteError(
            f"{', '.join(bad[:3])}{f' and {len(bad) - 3} more' if len(bad) > 3 else ''} became NaN or infinite by step {step}, through a gradient: "
            "no loss was. This step is not saved. detect_anomaly=True names the operation (a square root or a norm of 0, most often), "
            'gradient_clip_val=1.0 names the step, nonfinite="skip" leaves such steps out.'
        )


def is_among_best(cfg: Settings, run: Run) -> bool:
    """Whether the metrics of a validation, right behind it, belong to the best that are kept."""
    if cfg.checkpoint is None or cfg.monitor is None or cfg.checkpoint.keep_best == 0:
        return False
    if is_other_rank(run.ranks):  # the folder is rank 0's
        return agreed(run.ranks, False)
    value = run.progress.metrics[cfg.monitor]
    best = ranked(run.saver.expected, cfg.monitor, cfg.monitor_mode)[: cfg.checkpoint.keep_best]
    if len(best) < cfg.checkpoint.keep_best:
        return agreed(run.ranks, value == value)
    worst = best[-1].metrics[cfg.monitor]
    return agreed(run.ranks, value < worst if cfg.monitor_mode == "min" else value > worst)
