"""When ranks wait for one that does not come: which one it is, where it is, and in which collective the others wait."""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from sheer.distributed.recorder import recorded_collectives

if TYPE_CHECKING:
    from sheer.distributed.stop import StopAgreement

NOT_THE_USERS = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path(__file__).parents[1]), "<")


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    rank: int
    step: int
    waits: str = ""  # the collective that it waits in; empty: in none
    last: str = ""  # the last that it has finished
    line: str = ""  # of the program
    silent: float = 0.0  # seconds since it was heard of; 0: it answers


def find_place(rank: int, step: int, waits: bool) -> Place:
    """Return where this rank is; `waits` says that it is known to wait in a collective, or to have given up waiting."""
    collectives = recorded_collectives()
    waiting = [collective for collective in collectives if collective.waiting] or collectives[-1:] * waits
    done = [collective for collective in collectives if collective not in waiting]
    return Place(
        rank,
        step,
        waits=str(waiting[0]) if waiting else "a collective" if waits else "",
        last=str(done[-1]) if done else "",
        line=line_of_program(),
    )


def line_of_program() -> str:
    """Return where the main thread is: the innermost line, and the innermost that is the user's own."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    inner = own = ""
    while frame is not None and not own:
        file = frame.f_code.co_filename
        line = f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        inner = inner or line
        own = "" if file.startswith(NOT_THE_USERS) else line
        frame = frame.f_back
    return inner if own in ("", inner) else f"{own} ({inner})"


def describe_places(places: list[Place]) -> str:
    """Say which ranks the others wait for, and where those and the others are."""
    missing = [place for place in places if not place.waits or place.silent]
    lowest = min(place.step for place in places)
    if not missing and any(place.step > lowest for place in places):
        missing = [place for place in places if place.step == lowest]
    lines = [describe_missing(place) for place in missing]
    waiting: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place in places:
        if place not in missing:
            waiting[place.waits, place.step].append(place.rank)
    if not missing:
        lines.append(
            "Every rank waits: not all in the same collective, or a device hangs."
            if len(waiting) > 1
            else "Every rank waits in the same collective: a device or the network hangs."
        )
    for (waits, step), ranks in waiting.items():
        lines.append(f"{name_ranks(ranks)} wait{'s' if len(ranks) == 1 else ''} in {waits}, in step {step:,}.")
    return "\n".join(lines)


def describe_missing(place: Place) -> str:
    """Say where a rank is that others wait for."""
    if place.silent:
        return f"Rank {place.rank} hangs: it was last heard of {place.silent:.0f} s ago, in step {place.step:,}."
    waits = f"; it waits in {place.waits}" if place.waits else ""
    last = f"; its last collective was {place.last}" if place.last else ""
    return f"Rank {place.rank} hangs: in step {place.step:,}, at {place.line or 'an unknown line'}{waits}{last}."


def name_ranks(ranks: list[int]) -> str:
    """Return the name of ranks, as `Ranks 0, 2-5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][-1] == rank - 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    names = ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)
    return f"Rank{'s' if len(ranks) > 1 else ''} {names}"


def is_timeout(error: BaseException) -> bool:
    """Whether an error says that this rank waited for others in vain."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("timed out" in text or "timeout" in text)


def explain_timeout(error: BaseException, agreement: StopAgreement) -> str:
    """Say which rank did not come, where it is, and which collective was waited in. Asks the other ranks, for some seconds."""
    collectives = recorded_collectives()
    waiting = [collective for collective in collectives if collective.waiting] or collectives[-1:]
    if not waiting:
        return f"A collective was not finished in time ({error}).\n{agreement.stragglers()}"
    return f"{waiting[0]} was not finished within {waiting[0].timeout:g} s.\n{agreement.stragglers()}"
