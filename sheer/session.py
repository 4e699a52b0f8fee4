"""The time between the first and the last step: the folder locked, loggers and console open, and all of it closed whatever happens."""

from __future__ import annotations

import sys
import traceback
from types import TracebackType

import torch

from sheer.checkpoint.store import committed
from sheer.data.batch import describe
from sheer.errors import NonFiniteError, RunError
from sheer.run import Run
from sheer.rundir import forget, is_new, lock, write_record
from sheer.signals import EXIT_STATUS, StopSignals


class Session:
    """Opens what a run needs while it goes; on an error tells the callbacks, and adds to the error where it happened."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._open = False
        self._told: BaseException | None = None

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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open:  # one's own loop was left by a signal, or finished, inside its `with`
            return
        self._open = False
        try:
            if error is not None:
                self.tell(error)
                for callback in self.run.events.exception:
                    callback.on_exception(error)
        finally:  # a callback may fail, too
            self._close()
        if (
            error is not None
            and self.run.progress.step <= 1
            and is_new(self.run.record)
            and not committed(self.run.checkpoints)
        ):
            forget(self.run.info.run_dir)

    def _close(self) -> None:
        if self.run.data is not None:
            self.run.data.source.close()
        self.run.loggers.close()
        self.run.console.close()
        self._lock.release()

    def tell(self, error: BaseException) -> None:
        """Add to an error where it happened, once."""
        if self._told is not error:
            self._told = error
            error.add_note(self._where(error))

    def _where(self, error: BaseException) -> str:
        """Say in which step an error happened, on which batch, with how much memory in use."""
        step, batch = self.run.progress.step, self.run.data.yielded if self.run.data is not None else None
        passed = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
        lines = [f"In step {step:,}" if step else "Before the first step"]
        if "sheer.data.feed" in passed:
            lines = [f"While the batches of step {step + 1:,} were read from the training loader"]
        elif isinstance(error, NonFiniteError):
            lines = [f"Found at step {step:,}"]
        elif batch is not None and "sheer.evaluation" not in passed:
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
        if "backward through the graph a second time" in str(error):
            lines.append("the step function calls backward itself, most likely: it is to return the loss, and no more")
        script = script_that_runs()
        if script is not None:
            lines.append(f"`sheer show {script}` prints the loop")
        return "; ".join(lines) + "."


def script_that_runs() -> str | None:
    """Return the file that Python was started with; None at a prompt, in a notebook, or where a module was started by its name."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    return sys.argv[0] if file is not None and file.endswith(".py") and main.__spec__ is None else None


def leave_if_told(run: Run, signals: StopSignals) -> None:
    """End the process if a signal came, also one that came while the last step was validated or saved.

    Nothing of the script that comes after the training is to run.

    Raises:
        SystemExit: with status 85, which tells a scheduler to start the script again.
    """
    if signals.received is None or hasattr(sys, "ps1"):  # at a prompt there is no process to end
        return
    last = run.checkpoints / "last"
    where = f"saved in {last}" if last.is_symlink() else "not saved, since checkpoint=False"
    print(f"stopped by {signals.received} after step {run.progress.step:,}, {where}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_STATUS)
