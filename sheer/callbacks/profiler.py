"""Record what happens in a few steps, with torch.profiler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sheer.errors import SettingsError
from sheer.events import RunInfo


class Profiler:
    """Writes traces of a few steps into the run's folder `profile`, and prints what took the most time.

    The files open in Perfetto (ui.perfetto.dev), in chrome://tracing and in TensorBoard. A cycle is `wait` steps, then `warmup`
    steps whose records are dropped, then `active` steps that are recorded.

    Args:
        wait: steps without recording.
        warmup: steps that are recorded and dropped, since starting to record takes time.
        active: steps that are recorded.
        repeat: number of cycles, each with a file of its own; 0: until the run ends.
        record_shapes: record the shapes of the operations' inputs.
        profile_memory: record what is allocated and freed.
        with_stack: record where in the source each operation was called; slow.
        rows: lines of the table that is printed; 0: no table.

    Raises:
        SettingsError: a number is below 0, or nothing is recorded.
    """

    def __init__(
        self,
        *,
        wait: int = 5,
        warmup: int = 2,
        active: int = 3,
        repeat: int = 1,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        rows: int = 10,
    ) -> None:
        if min(wait, warmup, repeat, rows) < 0 or active < 1:
            raise SettingsError(
                f"Profiler(wait={wait}, warmup={warmup}, active={active}, repeat={repeat}, rows={rows}): active is at least 1, the others 0."
            )
        self.wait, self.warmup, self.active, self.repeat, self.rows = wait, warmup, active, repeat, rows
        self.record_shapes, self.profile_memory, self.with_stack = record_shapes, profile_memory, with_stack
        self._folder = Path()
        self._step = 0
        self._last: int | None = None
        self._profile: Any = None

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        """Start the schedule."""
        from torch.profiler import profile, schedule

        self._folder, self._step = info.run_dir / "profile", info.start_step
        cycle = self.wait + self.warmup + self.active
        self._last = info.start_step + cycle * self.repeat if self.repeat else None
        self._profile = profile(
            schedule=schedule(wait=self.wait, warmup=self.warmup, active=self.active, repeat=self.repeat),
            on_trace_ready=self._write,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            acc_events=True,
        )
        self._profile.start()

    def on_step_end(self, step: int, model: nn.Module) -> None:
        """Go on to the next step of the schedule."""
        self._step = step
        if self._profile is not None:
            self._profile.step()
            if step == self._last:
                self._stop()

    def on_fit_end(self, step: int, model: nn.Module) -> None:
        """Write what was recorded so far."""
        self._stop()

    def on_exception(self, error: BaseException) -> None:
        """Write what was recorded so far."""
        self._stop()

    def _stop(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, recorded: Any) -> None:
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"train.{self._step}.pt.trace.json"  # TensorBoard reads <worker>.<number>.pt.trace.json
        recorded.export_chrome_trace(str(path))
        if self.rows:
            averages = recorded.key_averages()
            on_device = any(event.self_device_time_total > 0 for event in averages)
            order = "self_device_time_total" if on_device else "self_cpu_time_total"
            print(f"profile up to step {self._step:,}: {path}")
            print(averages.table(sort_by=order, row_limit=self.rows, max_name_column_width=40), flush=True)
