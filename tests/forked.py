"""Python commands run in processes forked from one that has imported torch and Sheer, which saves each of them two to four seconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.ranks import PRELOADED, free_port, place_of

ANEW = ("sheer", "tests", "torchmetrics", "pytest", "_pytest", "hypothesis")
"""What a command imports itself, or not: whether it could, and whether it did, is looked at."""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


def run(command: list[str], *, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Stand for `subprocess.run` where the command is this interpreter with a script, `-m module` or `-c code`; or torchrun.

    Of PRELOADED, all is there from the start but ANEW.
    """
    if command[0] != sys.executable or command[1:3] == ["-m", "ruff"]:
        return subprocess.run(command, env=env, **options)
    ranks, arguments = 1, command[1:]
    if arguments[:3] == TORCHRUN:
        ranks, arguments = int(arguments[3].partition("=")[2]), arguments[4:]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, environment = free_port(), dict(os.environ if env is None else env)
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            own = place_of(rank, ranks, port) if ranks > 1 else {}
            process = context.Process(
                target=_child, args=(arguments, str(Path.cwd()), environment | own, f"{folder}/{rank}")
            )
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
        out, error = (
            "".join(file.read_text() for file in sorted(Path(folder).glob(kind))) for kind in ("*.out", "*.err")
        )
    status = next((process.exitcode for process in processes if process.exitcode), 0)
    if not options.get("capture_output"):
        os.write(1, out.encode()), os.write(2, error.encode())
    return subprocess.CompletedProcess(command, status, out, error)


def _child(arguments: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    """Be what a new interpreter would be that got these arguments."""
    import torch

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    for name in [name for name in sys.modules if name.partition(".")[0] in ANEW]:
        del sys.modules[name]
    what, *rest = arguments
    sys.path.insert(0, str(Path(what).resolve().parent) if not what.startswith("-") else folder)
    status: Any = 0
    try:
        if what == "-c":
            exec(rest[0], {"__name__": "__main__"})
        elif what == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(what, run_name="__main__")
    except SystemExit as error:
        status = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    with contextlib.suppress(ValueError):  # closed by the script
        sys.stdout.flush(), sys.stderr.flush()
    os._exit(status if isinstance(status, int) else status is not None)
