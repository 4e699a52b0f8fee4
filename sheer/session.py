"""The time between the first and the last step: the folder locked, loggers and console open, and all of it closed whatever happens."""

from __future__ import annotations

import atexit
import sys
import traceback
from types import TracebackType

import torch

from sheer.data.batch import describe
from sheer.distributed.agree import first_of, is_other_rank
from sheer.distributed.hang import explain_timeout, is_timeout
from sheer.distributed.stop import StopAgreement
from sheer.distributed.words import departure_status
from sheer.distributed.world import leave
from sheer.errors import NonFiniteError, RunError
from sheer.garbage import hold_collections, let_collections_go
from sheer.run import Run
from sheer.rundir import forget, is_new, lock, write_record
from sheer.signals import StopSignals, ToldToLeave, is_signal


class Session:
    """Opens what a run needs while it goes; on an error tells the callbacks, and adds to the error where it happened."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._open = False
        self._told: BaseException | None = None

    def __enter__(self) -> Session:
        if not is_other_rank(self.run.ranks):
            self._lock = lock(self.run.info.run_dir)
            try:
                write_record(self.run.info.run_dir, self.run.record)
            except RunError:
                self._lock.release()
                raise
        self._open = True
        if self.run.agreement is not None:
            self.run.agreement.start()
        if not is_new(self.run.record):
            self.run.loggers.warn_of_lost(self.run.info)
        self.run.loggers.start(self.run.info)
        self.run.console.open(self.run.progress, self.run.total_steps)
        self.run.compilations.open()
        hold_collections()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not self._open:  # one's own loop was left by a signal, or finished, inside its `with`
            return False
        self._open = False
        if isinstance(error, ToldToLeave) and self.run.leave is not None:
            try:
                self.run.leave()
            finally:  # it may not be possible to save
                self._close(None)
            return True
        try:
            if error is not None:
                self.tell(error)
                # Before the first step the others raise the same, most likely, and a script may go on with something else.
                if self.run.agreement is not None and self.run.progress.step > self.run.info.start_step:
                    tell_other_ranks(error, self.run.agreement)
                for callback in self.run.events.exception:
                    callback.on_exception(error)
        finally:  # a callback may fail, too
            self._close(error)
        if (
            error is not None
            and self.run.progress.step <= 1
            and not is_other_rank(self.run.ranks)
            and is_new(self.run.record)
            and not self.run.saver.saves
        ):
            forget(self.run.info.run_dir)
        return False

    def _close(self, error: BaseException | None) -> None:
        let_collections_go()
        self._end_saving(error)
        if self.run.agreement is not None:
            self.run.agreement.close()
        if self.run.data is not None:
            self.run.data.source.close()
        if self.run.graphs is not None:
            self.run.graphs.close()
        self.run.compilations.close()
        self.run.loggers.close()
        self.run.console.close()
        if not is_other_rank(self.run.ranks):
            self._lock.release()

    def _end_saving(self, error: BaseException | None) -> None:
        """Wait for the checkpoint that is being written; where the run fails already, its own failure is only added to that."""
        if isinstance(error, KeyboardInterrupt):  # at once
            return
        if error is not None:
            self.run.saver.give_up()
        try:
            self.run.saver.wait()
        except RunError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

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
        if isinstance(error, torch.OutOfMemoryError) and "sheer.evaluation" in passed:
            lines.append("an evaluation takes the batches of its loader as they are: give that a smaller batch_size")
        elif isinstance(error, torch.OutOfMemoryError):
            lines.append(
                "micro-batches were halved already"
                if self.run.progress.micro_batch_size is not None
                else "set micro_batch_size to compute the same step in smaller parts"
            )
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
        SystemExit: with status 85, which tells a scheduler to start the script again; on several ranks the launcher ends with it.
    """
    received = first_of(run.ranks, signals.received or (run.progress.stopped_by if run.ranks is not None else None))
    if not is_signal(received) or hasattr(sys, "ps1"):  # at a prompt there is no process to end
        return
    where = (
        f"saved in {run.saver.disk}/last"
        if run.saver.disk.pointed("last") is not None
        else "not saved, since checkpoint=False"
    )
    if not is_other_rank(run.ranks):
        print(f"stopped by {received} after step {run.progress.step:,}, {where}", file=sys.stderr, flush=True)
    raise SystemExit(departure_status())


def tell_other_ranks(error: BaseException, agreement: StopAgreement) -> None:
    """Add to an error which rank was waited for in vain, if that is what it is, and let the other ranks know of it."""
    if is_timeout(error):
        error.add_note(explain_timeout(error, agreement))
    atexit.unregister(leave)  # which would wait for the others
    agreement.failed(f"{type(error).__name__}: {error}")
