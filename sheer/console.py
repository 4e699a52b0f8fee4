"""What a person sees: what was decided at the start, how far the run is, what it measured. Lines, and a live bar in a terminal."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sheer.errors import SheerWarning, user_level
from sheer.progress import Progress

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


_MOST = 10  # metrics in a line
_WINDOW = 30.0  # seconds over which the speed is measured


class Console:
    """Prints a line at each log point; in a terminal a live bar shows the step, its speed and the time that is left.

    The bar reads the counters from a thread of its own, four times a second: a step does nothing for it.

    Args:
        live: show the bar; None: where the output is a terminal.
        file: where to print; None: standard output.
    """

    def __init__(self, *, live: bool | None = None, file: TextIO | None = None) -> None:
        self.file = file or sys.stdout
        terminal = self.file.isatty() and os.environ.get("TERM") != "dumb"
        self.is_live = terminal if live is None else live
        self._progress: Progress | None = None
        self._total: int | None = None
        self._latest: dict[str, float] = {}
        self._marks = [(time.monotonic(), 0)]
        self._live: Live | None = None
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        try:
            if self._live is not None:
                self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, file=self.file, flush=True)
        except OSError as error:  # a closed pipe, as behind `| head`
            self.close()
            self.file = Path(os.devnull).open("w")  # noqa: SIM115
            warnings.warn(
                f"The console cannot print any more, and training goes on: {error}.",
                SheerWarning,
                stacklevel=user_level(),
            )

    def open(self, progress: Progress, total: int | None) -> None:
        """Start to show the run that `progress` counts, of `total` steps if that is known."""
        self._progress, self._total = progress, total
        self._marks = [(time.monotonic(), progress.step)]
        if self.is_live:
            self._open_bar()

    def expect(self, total: int | None) -> None:
        """Take the number of steps, where it is known only when the loop gets its loader."""
        self._total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def _open_bar(self) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[tail]}"),
        )
        self._bar = Bar(*columns, auto_refresh=False)
        self._task = self._bar.add_task("", total=self._total, tail="")
        console = RichConsole(file=self.file)
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)
        self._live.start()

    def _render(self) -> Any:
        """Draw the bar from the counters as they are now; called by its own thread."""
        assert self._bar is not None and self._task is not None and self._progress is not None
        step = self._progress.step
        now = time.monotonic()
        if step != self._marks[-1][1]:
            recent = [mark for mark in self._marks if now - mark[0] < _WINDOW]
            self._marks = [*(recent or self._marks[-1:]), (now, step)]
        description = (
            f"step {step:,}" + (f"/{self._total:,}" if self._total else "") + f" · epoch {self._progress.epoch}"
        )
        self._bar.update(self._task, completed=step, description=description, tail=" · ".join(self._tail(step)))
        return self._bar.get_renderable()

    def _tail(self, step: int) -> list[str]:
        tail = [
            f"{name.split('/')[-1]} {short_number(value)}"
            for name, value in self._latest.items()
            if name.startswith("train/")
        ][:3]
        (then, before), (now, done) = self._marks[0], self._marks[-1]
        speed = (done - before) / (now - then) if now > then else 0.0
        if speed > 0:
            tail.append(f"{short_number(speed)} steps/s")
            if self._total:
                tail.append(f"{clock((self._total - step) / speed)} left")
        return tail

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a log point; those of a validation get a line that stays."""
        self._latest.update(metrics)
        shown = {name: value for name, value in metrics.items() if name != "epoch"}
        validated = not any(name.startswith("train/") for name in shown)  # what callbacks add has names of its own
        if shown and (self._live is None or validated):
            of = f"/{self._total:,}" if self._total else ""
            values = " · ".join(f"{name} {short_number(value)}" for name, value in list(shown.items())[:_MOST])
            values += f" · and {len(shown) - _MOST} more" if len(shown) > _MOST else ""
            self.say(f"step {step:,}{of} · epoch {int(metrics.get('epoch', 0))} · {values}")

    def close(self) -> None:
        """Take the bar away."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def silent_console() -> Console:
    """Return a console that shows nothing: that of all ranks but the first."""
    return Console(live=False, file=Path(os.devnull).open("w"))


def short_number(value: float) -> str:
    """Write a number short: four significant digits, thousands set off."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def clock(seconds: float) -> str:
    """Write a duration as 1:23 or 4:05:06."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
