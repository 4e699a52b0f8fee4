"""What `sheer profile` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sheer.profile.advice import advise
from sheer.profile.report import draw_steps, report_of_profile, typical_seconds
from sheer.profile.script import CannotProfile, watch_script
from sheer.profile.trace import device_time
from sheer.rundir import folder_of_now


def profile_script(script: Path, arguments: Sequence[str], changes: Mapping[str, str], warmup: int, timed: int) -> str:
    """Profile a script, keep its trace and a picture in runs/profile/<script>-<time>, and return what there is to say.

    Args:
        script: the file.
        arguments: its own.
        changes: settings of its trainer, as text by name.
        warmup: steps that are run first.
        timed: steps that are timed.

    Raises:
        CannotProfile: it cannot be profiled; an error of the script goes through.
    """
    try:
        folder = folder_of_now(f"runs/profile/{script.stem}-")
    except OSError as error:
        raise CannotProfile(f"The folder {error.filename} for the trace cannot be made: {error.strerror}.") from error
    try:
        seen = watch_script(script, arguments, changes, warmup, timed, folder.resolve() / "trace.json")
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    typical = typical_seconds(seen.steps, seen.workers)
    total = sum(typical.values())
    device = None if seen.device.type == "cpu" else device_time(folder / "trace.json", seen.recorded)
    advice = advise(seen, {phase: taken / total for phase, taken in typical.items()}, total, device)
    draw_steps(seen.steps, folder / "step.png")
    return report_of_profile(str(script), seen, typical, device, advice, folder)
