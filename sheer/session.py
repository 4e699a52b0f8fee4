"""The time between the first and the last step: loggers and console open, signals heard, and all of it closed whatever happens."""

from __future__ import annotations

import sys
from types import TracebackType

import torch

from sheer.data.batch import describe
from sheer.errors import RunError
from sheer.run import Run
from sheer.rundir import forget, is_new, lock, write_record
from sheer.signals import EXIT_STATUS, StopSignals


class Session:
    """Opens what a run needs while it goes; on an error tells the callbacks, and adds to the error where it happened."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.signals = StopSignals()
        self._open = False

    def __enter__(self) -> Session:
        self._lock = lock(self.run.info.run_dir)
        try:
            write_record(self.run.info.run_dir, self.run.record)
        except RunError:
            self._lock.release()
            raise
        self._open = True
        self.run.loggers.start(self.run.info)
        self.run.console.open(self.run.progress, self.run.total_steps)
        self.signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open:  # one's own loop was left by a signal, or finished, inside its `with`
            return
        self._open = False
        self.signals.__exit__(kind, error, trace)
        try:
            if error is not None:
                error.add_note(self._where(error))
                for callback in self.run.events.exception:
                    callback.on_exception(error)
        finally:  # a callback may fail, too
            self._close()
        if error is not None and self.run.progress.step <= 1 and is_new(self.run.record) and self.run.saved is None:
            forget(self.run.info.run_dir)

    def _close(self) -> None:
        if self.run.data is not None:
            self.run.data.source.close()
        self.run.loggers.close()
        self.run.console.close()
        self._lock.release()

    def _where(self, error: BaseException) -> str:
        """Say in which step an error happened, on which batch, with how much memory in use."""
        step, batch = self.run.progress.step, self.run.batch
        lines = [f"In step {step:,}" if step else "Before the first step"]
        if batch is not None:
            lines.append(f"its batch: {describe(batch)}")
        if self.run.compute.device.type != "cpu":
            used, top = torch.accelerator.memory_allocated(), torch.accelerator.max_memory_allocated()
            lines.append(
                f"memory on {self.run.compute.device}: {used / 2**30:.2f} GiB in use, {top / 2**30:.2f} GiB at most"
            )
        if isinstance(error, torch.OutOfMemoryError):
            lines.append("set micro_batch_size to compute the same step in smaller parts")
        if isinstance(error, StopIteration):
            lines.append(
                "a StopIteration came out of your own code: a next() without a default, most likely; it does not end the epoch"
            )
        return "; ".join(lines) + "."


def leave_if_told(run: Run, signal: str | None) -> None:
    """End the process if a signal came, also one that came while the last step was validated or saved.

    Nothing of the script that comes after the training is to run.

    Raises:
        SystemExit: with status 85, which tells a scheduler to start the script again.
    """
    if signal is None or hasattr(sys, "ps1"):  # at a prompt there is no process to end
        return
    where = f"saved in {run.checkpoints / 'last'}" if run.saved else "not saved, since checkpoint=False"
    print(f"stopped by {signal} after step {run.progress.step:,}, {where}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_STATUS)
