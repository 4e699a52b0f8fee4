"""What a person gets to see of a profile: a table, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from sheer.profile.advice import waits_of
from sheer.profile.phases import CALLBACKS, DATA, LOGGING, PHASES, REST, SAVING, VALIDATION, Segment, seconds_of
from sheer.profile.script import Seen
from sheer.profile.trace import DeviceTime

DUE = (LOGGING, VALIDATION, SAVING, CALLBACKS)  # not in each step
UNEVEN = 3.0  # times the median
COLOURS = (
    "#888888",
    "#b07aa1",
    "#86bcb6",
    "#4e79a7",
    "#76b7b2",
    "#f28e2b",
    "#edc948",
    "#59a14f",
    "#9c755f",
    "#e15759",
    "#dddddd",
)


def typical_seconds(steps: Sequence[list[Segment]], workers: int | None = None) -> dict[str, float]:
    """Return how many seconds each phase takes in a step: the median, which one hiccup does not move; on average what is due now and then.

    Args:
        steps: who had the clock when.
        workers: of the loader; the batches of several come in bursts, so that waiting for them is due now and then as well.
    """
    taken = [seconds_of(step) for step in steps]
    now_and_then = (*DUE, DATA) if workers else DUE
    return {
        phase: (statistics.fmean if phase in now_and_then else statistics.median)(step[phase] for step in taken)
        for phase in PHASES
    }


def table_of_phases(typical: Mapping[str, float], device: DeviceTime | None) -> str:
    """Write the table; a phase that a run has not is left out."""
    total = sum(typical.values())
    rows = [(phase, taken) for phase, taken in typical.items() if taken > 0 or phase == REST]
    width = max(len("device idle (host-bound gaps)"), *(len(phase) for phase, _ in rows))
    lines = [f"{'':{width}}  {'ms a step':>10}  {'share':>6}"]
    lines += [f"{phase:{width}}  {taken * 1e3:10.3f}  {taken / total:6.1%}" for phase, taken in rows]
    lines += [f"{'a step':{width}}  {total * 1e3:10.3f}  {1:6.1%}"]
    if device is None:
        return "\n".join([*lines, "device idle (host-bound gaps): not applicable, the host computes"])
    idle = max(0.0, total - device.busy)
    lines += [f"{'device idle (host-bound gaps)':{width}}  {idle * 1e3:10.3f}  {idle / total:6.1%}"]
    lines += [
        f"device: {device.busy * 1e3:.3f} ms a step at work, {device.kernels:.0f} kernels; the host waited for it {device.waits:.1f}x a step"
    ]
    return "\n".join(lines)


def uneven(steps: Sequence[list[Segment]]) -> list[str]:
    """Return a line where one step took far longer than most: what is due now and then, or another process."""
    lengths = sorted(step[-1][2] - step[0][1] for step in steps)
    longest, median = lengths[-1], lengths[len(lengths) // 2]
    if longest < UNEVEN * median:
        return []
    return [f"uneven: the longest step took {longest * 1e3:.3g} ms, the median {median * 1e3:.3g} ms (see the picture)"]


def report_of_profile(
    name: str, seen: Seen, typical: Mapping[str, float], device: DeviceTime | None, advice: Sequence[str], folder: Path
) -> str:
    """Return all that is printed."""
    settings = seen.settings
    ways = ", ".join(
        [
            str(seen.device),
            settings.precision,
            *(["compiled"] if settings.compile else []),
            f"{seen.parameters:,} parameters",
        ]
    )
    lines = [f"{name} ({ways}): {len(seen.steps)} steps timed, {seen.recorded} more recorded", ""]
    lines += [table_of_phases(typical, device), *uneven(seen.steps), "", "worth trying:"]
    lines += [f"  {number}. {text}" for number, text in enumerate(advice, 1)] or ["  nothing stands out"]
    if seen.syncs:
        lines += ["", "where the host waits in your own code:", *(f"  {text}" for text in waits_of(seen))]
    if seen.left_out:
        lines += ["", f"left out: {', '.join(seen.left_out)}"]
    return "\n".join(
        [*lines, "", f"trace:   {folder / 'trace.json'} (ui.perfetto.dev)", f"picture: {folder / 'step.png'}", ""]
    )


def draw_steps(steps: Sequence[list[Segment]], path: Path) -> None:
    """Draw the step of median length over time, and all steps as stacked bars."""
    from matplotlib.figure import Figure as Plot
    from matplotlib.patches import Patch

    lengths = [step[-1][2] - step[0][1] for step in steps]
    middle = steps[sorted(range(len(steps)), key=lengths.__getitem__)[len(steps) // 2]]
    colours = dict(zip(PHASES, COLOURS, strict=True))
    plot = Plot(figsize=(9, 5), layout="constrained")
    one, every = plot.subplots(2, 1, height_ratios=[1, 3])
    began = middle[0][1]
    one.broken_barh(
        [((since - began) * 1e3, (until - since) * 1e3) for _, since, until in middle],
        (0, 1),
        facecolors=[colours[phase] for phase, _, _ in middle],
    )
    one.set(
        title="the step of median length, as the host sees it",
        xlabel="ms",
        yticks=[],
        xlim=(0, (middle[-1][2] - began) * 1e3),
    )
    taken = [seconds_of(step) for step in steps]
    numbers, bottom = range(1, len(steps) + 1), [0.0] * len(steps)
    for phase in PHASES:
        heights = [step[phase] * 1e3 for step in taken]
        every.bar(numbers, heights, bottom=bottom, width=0.9, color=colours[phase])
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    every.set(title="each step", xlabel="step", ylabel="ms")
    shown = [phase for phase in PHASES if any(step[phase] > 0 for step in taken)]
    plot.legend(handles=[Patch(color=colours[phase], label=phase) for phase in shown], loc="outside right upper")
    plot.savefig(path, dpi=120)
