"""How a run goes on from a checkpoint."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

from sheer.checkpoint import store
from sheer.checkpoint.codec import decode
from sheer.due import duration_over
from sheer.errors import RunError, SheerWarning
from sheer.run import Run
from sheer.rundir import refuse_differences
from sheer.settings import Settings
from sheer.signals import is_signal
from sheer.weights import checkpoint_in, load_model


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


def restore(run: Run, path: Path, *, same_run: bool) -> None:
    """Bring a run to where a checkpoint was made. The checkpoint was verified."""
    tensors = store.read_tensors(path, "state")
    weights, trained = store.read_tensors(path, "model"), store.read_tensors(path, "training")
    extra = decode(store.read_text(path, "extra"), tensors)
    load_model(run.model, {**(trained or weights), **extra}, path)
    run.load_state_dict(decode(store.read_text(path, "state"), tensors), same_run=same_run)
    if trained and run.averaging is not None:
        run.averaging.load_averages(weights)


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
