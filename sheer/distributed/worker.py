"""What `sheer run` starts for each rank: `python -m sheer.distributed.worker script arguments`."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from sheer.distributed.output import write_to_file
from sheer.distributed.words import RUNS, departure_status, launcher_folder, leave_word, report_error
from sheer.errors import from_the_script
from sheer.launch import telling_of_untaken
from sheer.signals import EXIT_STATUS, SIGNALS

ECHOES = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Read error", "Write error")


def work() -> None:
    """Run the script as a rank; the launcher is told how it ends."""
    script, *sys.argv[1:] = sys.argv[1:]
    sys.argv[0] = script
    sys.path[0] = str(Path(script).resolve().parent)
    for name in SIGNALS:  # outside of a run there is nothing to save
        signal.signal(getattr(signal, name), leave_at_once)
    folder = launcher_folder()
    if folder is not None:
        leave_word(folder, RUNS, {"pid": os.getpid()})
    try:
        with telling_of_untaken(script) if os.environ.get("RANK") == "0" else nullcontext():
            runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        if error.code == EXIT_STATUS:
            sys.exit(departure_status())
        if error.code:
            left = f"left with {'status ' if isinstance(error.code, int) else ''}{error.code}"
            report_error(left, left, echo=False)
        raise
    except BaseException as error:
        text = "".join(traceback.format_exception(type(error), error, from_the_script(error.__traceback__)))
        write_to_file(text)
        if not report_error(text, f"{type(error).__name__}: {error}", is_echo(error)):
            raise
        sys.exit(1)
    finally:
        for name in SIGNALS:  # it is leaving: an exception out of what runs at exit would only be noise
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """Leave, as one who was told to stop while no run was going on."""
    raise SystemExit(EXIT_STATUS)


def is_echo(error: BaseException | None) -> bool:
    """Whether an error only says that another rank is gone."""
    while error is not None:
        if isinstance(error, dist.DistNetworkError) or any(text in str(error) for text in ECHOES):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    work()
