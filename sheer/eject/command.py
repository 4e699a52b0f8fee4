"""What `sheer eject` and `sheer show` do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from sheer.eject.check import check
from sheer.eject.eject import eject, eject_to_loop
from sheer.eject.program import Refusal


def write(
    script: Path, arguments: Sequence[str], out: Path | None, *, to: str, force: bool, updates: int | None
) -> list[str]:
    """Eject a script into a file; return what there is to say.

    Args:
        script: the script.
        arguments: its own arguments.
        out: the file; None: `<script>_torch.py`, or `<script>_loop.py`, beside it.
        to: "torch" for a script without the library, "loop" for one whose loop is written out over the library's parts.
        force: write over a file that is there.
        updates: run both scripts for so many updates and compare them; None: do not.

    Raises:
        Refusal: the script cannot be ejected, the file is there, or the two do not do the same.
    """
    file = out or script.with_name(f"{script.stem}_{to}.py")
    if file.exists() and not force:
        raise Refusal(
            f"{file} is there, and may hold your own changes. Give another with -o, or --force to write over it."
        )
    made = eject(script, arguments) if to == "torch" else None
    text, ranks = (made.text, made.ranks) if made is not None else (eject_to_loop(script, arguments), 1)
    said = f"{file}: {len(text.splitlines())} lines"
    if updates is None:
        _keep(file, text)
        return [f"{said}; sheer eject --check compares it with {script}"]
    trial = file.with_name(f".{file.name}.trial.py")
    trial.write_text(text)  # beside the script, so that it finds what the script imports
    try:
        found = check(script, trial, arguments, updates, "sheer" if to == "torch" else "-", ranks)
    finally:
        trial.unlink()
    if found.difference is not None:
        raise Refusal(f"The two do not do the same: {found.difference}. Nothing was written. Please report this.")
    _keep(file, text)
    return [
        said,
        f"compared over {found.updates} updates and {found.logged} lines of metrics: weights, optimizer, random states and metrics are equal, bit for bit",
    ]


def _keep(file: Path, text: str) -> None:
    """Write an ejected file, and a copy that tells later which changes are the user's own."""
    file.write_text(text)
    copy = _copy_of(file)
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(text)


def _copy_of(file: Path) -> Path:
    return file.parent / ".sheer" / f"{file.name}.ejected"


def show(script: Path, arguments: Sequence[str]) -> str:
    """Return the loop that a script runs, as it would be ejected."""
    return eject(script, arguments).loop


def differences(script: Path, arguments: Sequence[str], earlier: Path) -> str:
    """Return how an ejected file would differ today, and how it was changed since, as unified diffs.

    Raises:
        Refusal: there is no such file.
    """
    if not earlier.exists():
        raise Refusal(f"There is no {earlier} to compare with. Give the ejected file with -o.")
    today, now, copy = eject(script, arguments).text, earlier.read_text(), _copy_of(earlier)
    if not copy.exists():
        return f"# {copy} is not there, so your own edits cannot be told from the rest.\n" + _diff(now, today, earlier)
    before = copy.read_text()
    parts = {
        "What ejecting today would change": _diff(before, today, earlier),
        "What you have changed since": _diff(before, now, earlier),
    }
    return "".join(
        f"# {title}: {text or 'nothing'}\n" if not text else f"# {title}:\n{text}" for title, text in parts.items()
    )


def _diff(one: str, other: str, file: Path) -> str:
    lines = difflib.unified_diff(one.splitlines(keepends=True), other.splitlines(keepends=True), str(file), str(file))
    return "".join(lines)
