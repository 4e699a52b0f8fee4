"""A run's checkpoints: what goes into one, and how a run goes on from one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sheer.checkpoint import store
from sheer.checkpoint.codec import decode, encode
from sheer.errors import NonFiniteError, RunError, SheerWarning
from sheer.run import Run, tensors_of
from sheer.settings import Settings


def save(cfg: Settings, run: Run) -> Path:
    """Write a checkpoint of the run as it is at the end of a step, and prune those that it makes superfluous."""
    if cfg.nonfinite == "raise":
        run.watch.check()
        check_weights(run.model, run.progress.step)
    tensors: dict[str, Tensor] = {}
    state = encode(run.state_dict(), tensors)
    trained, averages = tensors_of(run.model), run.averaging.averages() if run.averaging is not None else None
    groups = {"model": {**trained, **(averages or {})}, "state": tensors}
    if averages is not None:
        groups["training"] = trained  # "model" holds the averages, which are what is used
    extra = {name: value for name, value in run.model.state_dict().items() if not isinstance(value, Tensor)}
    texts = {"state": state, "extra": encode(extra, tensors, "extra")}
    metrics = run.last_metrics if run.validated_at == run.progress.step else {}
    facts = {"run_id": run.info.run_id, "metrics": encode(metrics, {}), "settings": dict(run.info.settings)}
    try:
        path = store.write(run.checkpoints, run.progress.step, groups, texts, facts)
    except (OSError, SafetensorError) as error:
        older = ", ".join(saved.path.name for saved in store.committed(run.checkpoints)) or "none"
        raise RunError(
            f"The checkpoint of step {run.progress.step} could not be written to {run.checkpoints}: {error}. The older ones are as they were: {older}. "
            'Make room (Checkpoint(keep_last=..., keep_best=...) says how many stay), then go on with resume="auto".'
        ) from error
    keep_best = cfg.checkpoint.keep_best if cfg.checkpoint is not None else 0
    keep_last = cfg.checkpoint.keep_last if cfg.checkpoint is not None else 1
    step = run.progress.step
    store.prune(
        run.checkpoints, step, keep_last=keep_last, keep_best=keep_best, monitor=cfg.monitor, mode=cfg.monitor_mode
    )
    return path


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
        or run.validated_at != run.progress.step
    ):
        return False
    value = run.last_metrics[cfg.monitor]
    saves = [
        saved for saved in store.committed(run.checkpoints) if saved.step < run.progress.step
    ]  # later: see `prune`
    best = store.ranked(saves, cfg.monitor, cfg.monitor_mode)[: cfg.checkpoint.keep_best]
    if len(best) < cfg.checkpoint.keep_best:
        return value == value
    worst = best[-1].metrics[cfg.monitor]
    return value < worst if cfg.monitor_mode == "min" else value > worst


def restore(run: Run, path: Path, *, same_run: bool) -> None:
    """Bring a run to where a checkpoint was made. The checkpoint was verified."""
    tensors = store.read_tensors(path, "state")
    weights, trained = store.read_tensors(path, "model"), store.read_tensors(path, "training")
    extra = decode(store.read_text(path, "extra"), tensors)
    load_model(run.model, {**(trained or weights), **extra}, path)
    run.load_state_dict(decode(store.read_text(path, "state"), tensors), same_run=same_run)
    if trained and run.averaging is not None:
        run.averaging.load_averages(weights)


def load_model(model: nn.Module, state: dict[str, Any], source: Path, *, strict: bool = True) -> None:
    """Load weights by name.

    Raises:
        RunError: names or shapes differ, and `strict`; all of them are listed.
    """
    own = model.state_dict()
    missing, more = [name for name in own if name not in state], sorted(name for name in state if name not in own)
    shapes = [
        f"{name} is {list(value.shape)} here and {list(state[name].shape)} there"
        for name, value in own.items()
        if isinstance(value, Tensor) and isinstance(state.get(name), Tensor) and value.shape != state[name].shape
    ]
    if shapes or (strict and (missing or more)):
        lines = [f"  not in {source.name}: {', '.join(missing)}"] * bool(missing)
        lines += [f"  not in the model: {', '.join(more)}"] * bool(more)
        lines += [f"  {line}" for line in shapes]
        raise RunError(f"The weights in {source} are of another model:\n" + "\n".join(lines))
    with torch.no_grad():
        model.load_state_dict(state, strict=strict)


def newest_good(directory: Path) -> Path | None:
    """Return the newest checkpoint in a folder that verifies; each newer one that does not is warned of."""
    for saved in reversed(store.committed(directory)):
        try:
            store.verify(saved.path)
        except RunError as error:
            warnings.warn(f"{error} Going back to the checkpoint before it.", SheerWarning, stacklevel=2)
        else:
            return saved.path
    return None


def checkpoint_in(source: str | Path, which: str = "last") -> Path:
    """Return the checkpoint that a path means: itself, or the last or best of a run's directory.

    Raises:
        RunError: there is no checkpoint.
    """
    path = Path(source)
    if (path / store.MANIFEST).is_file():
        return path.resolve()
    for candidate in (path / "checkpoints" / which, path / which):
        if (candidate / store.MANIFEST).is_file():
            return candidate.resolve()
    there = [saved.path.name for saved in store.committed(path / "checkpoints")] if path.is_dir() else []
    hint = f" It has {', '.join(there)}, but no {which!r}: was `monitor` set?" if there else ""
    raise RunError(
        f"{path} holds no checkpoint.{hint} Give a run's directory or one of its checkpoints/step-... folders."
    )


def load_weights(model: nn.Module, source: str | Path, which: str = "best", *, strict: bool = True) -> Path:
    """Load the weights of a run or checkpoint into a model, and return the checkpoint they are from.

    Args:
        model: takes the weights, in place.
        source: a run's directory, a checkpoint's directory, or a safetensors file.
        which: of a run's directory, "best" or "last".
        strict: raise an error where names are missing or superfluous; shapes must fit in any case.

    Raises:
        RunError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    path = Path(source)
    if path.is_file():
        from safetensors.torch import load_file

        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"{path} is no safetensors file, or a damaged one: {error}. Give a run's directory, a checkpoint's, or a .safetensors file."
            ) from error
        load_model(model, state, path, strict=strict)
        return path
    path = checkpoint_in(path, which)
    store.verify(path)
    load_model(model, dict(store.read_tensors(path, "model")), path, strict=strict)
    return path
