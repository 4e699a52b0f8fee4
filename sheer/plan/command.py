"""What `sheer plan` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from sheer.errors import SettingsError
from sheer.plan.estimate import estimate_script
from sheer.plan.table import has_room, memory_named, report_of
from sheer.settings import Parallel


def plan_script(
    script: Path, arguments: Sequence[str], changes: Mapping[str, str], world_size: int, rank: int, memory: str | None
) -> tuple[str, bool]:
    """Plan a script on so many ranks.

    Args:
        script: the file.
        arguments: its own.
        changes: settings of its trainer, as text by name.
        world_size: how many ranks there are.
        rank: the one that is shown.
        memory: of a device, as `memory_named` takes it.

    Returns:
        The tables, and whether it fits.

    Raises:
        SheerError: it cannot be planned.
    """
    if not 0 <= rank < world_size:
        raise SettingsError(f"--rank is from 0 to {world_size - 1} on {world_size} ranks, not {rank}.")
    device, size = memory_named(memory)
    found = estimate_script(script, arguments, dict(changes), world_size, rank)
    return report_of(found, str(script), device, size), has_room(found, size)


def read_parallel(text: str) -> dict[str, str]:
    """Read `--parallel` as settings: "fsdp", or sizes such as "tp=8,dp_replicate=4".

    Raises:
        SettingsError: it is neither.
    """
    if "=" not in text:
        return {"parallel": text}
    known = [field.name for field in dataclasses.fields(Parallel)]
    changes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() not in known or not value:
            raise SettingsError(
                f'--parallel is "ddp", "fsdp", or sizes such as tp=8,dp_replicate=4; {part!r} is no size.'
            )
        changes[f"parallel.{name.strip()}"] = value.strip()
    return changes
