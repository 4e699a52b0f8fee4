"""What `sheer eject` and `sheer show` do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from sheer.eject.check import check
from sheer.eject.eject import eject
from sheer.eject.program import Refusal


def write(script: Path, arguments: Sequence[str], out: Path | None, *, force: bool, updates: int | None) -> list[str]:
    """Eject a script into a file; return what there is to say.

    Args:
        script: the script.
        arguments: its own arguments.
        out: the file; None: `<script>_torch.py` beside it.
        force: write over a file that is there.
        updates: run both scripts for so many updates and compare them; None: do not.

    Raises:
        Refusal: the script cannot be ejected, the file is there, or the two do not do the same.
    """
    file = out or script.with_name(f"{script.stem}_torch.py")
    if file.exists() and not force:
        raise Refusal(
            f"{file} is there, and may hold your own changes. Give another with -o, or --force to write over it."
        )
    text = eject(script, arguments).text
    if updates is None:
        file.write_text(text)
        return [f"{file}: {len(text.splitlines())} lines; sheer eject --check compares it with {script}"]
    trial = file.with_name(f".{file.name}.trial.py")
    trial.write_text(text)  # beside the script, so that it finds what the script imports
    try:
        found = check(script, trial, arguments, updates)
    finally:
        trial.unlink()
    if found.difference is not None:
        raise Refusal(f"The two do not do the same: {found.difference}. Nothing was written. Please report this.")
    file.write_text(text)
    return [
        f"{file}: {len(text.splitlines())} lines",
        f"compared over {found.updates} updates and {found.logged} lines of metrics: weights, optimizer, random states and metrics are equal, bit for bit",
    ]


def show(script: Path, arguments: Sequence[str]) -> str:
    """Return the loop that a script runs, as it would be ejected."""
    return eject(script, arguments).loop


def differences(script: Path, arguments: Sequence[str], earlier: Path) -> str:
    """Return how an ejected file differs from what the script ejects to today: as lines of a unified diff."""
    today = eject(script, arguments).text.splitlines(keepends=True)
    before = earlier.read_text().splitlines(keepends=True)
    return "".join(difflib.unified_diff(before, today, str(earlier), "today"))
