"""What `sheer autotune` does: runs a script up to its call of `fit`, and tunes that instead of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sheer.scripts import as_main, run_to_fit
from sheer.speed.autotune import find_way
from sheer.speed.ways import Way, own_way


def autotune_script(script: Path, arguments: Sequence[str], changes: Mapping[str, str]) -> str:
    """Tune the first call of `fit` in a script, and return what to write into it.

    Raises:
        SheerError: it cannot be tuned.
    """
    with as_main(script, arguments):
        call = run_to_fit(script, changes, "autotune")
        return advice(find_way(call), own_way(call.settings))


def advice(way: Way, base: Way) -> str:
    """Say what to write for a way."""
    names = ("compile", "cuda_graph", "precision", "micro_batch_size")
    changes = {name: repr(getattr(way, name)) for name in names if getattr(way, name) != getattr(base, name)}
    if way.activation_memory_budget != base.activation_memory_budget:
        mode = "" if way.compile is True else f"mode={way.compile!r}, "
        changes["compile"] = f"sheer.Compile({mode}activation_memory_budget={way.activation_memory_budget})"
    trainer = ", ".join(f"{name}={value}" for name, value in changes.items())
    lines = [f"sheer.Trainer(..., {trainer})"] if trainer else []
    lines += [f"{name}=True for the optimizer" for name in ("fused", "foreach") if getattr(way, name)]
    of_loader = {"num_workers": way.num_workers, "prefetch_factor": way.prefetch_factor}
    of_loader_changed = [f"{name}={value}" for name, value in of_loader.items() if value is not None]
    lines += [f"{', '.join(of_loader_changed)} for the training loader"] if of_loader_changed else []
    return "write " + "\n      ".join(lines) if lines else "nothing that was tried is faster than the script as it is"
