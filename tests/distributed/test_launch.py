"""`sheer run --nproc-per-node`: real ranks, real signals, real deaths."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from sheer.distributed.worker import work
from sheer.signals import EXIT_STATUS, SIGNALS
from tests.distributed import launched
from tests.ranks import free_port, run_on_ranks

SCRIPT = """
import os, pathlib, signal, sys, time
import torch, torch.distributed as dist
from sheer.distributed.output import open_output
from sheer.distributed.world import join
from sheer.launch import overrides

place = join(60)
rank = place.rank
pathlib.Path(f"process-{rank}-{os.environ['TORCHELASTIC_RESTART_COUNT']}").write_text(str(os.getpid()))
open_output(pathlib.Path("run"), rank)
total = torch.ones(1)
dist.all_reduce(total)
print("rank", rank, "of", int(total), dict(overrides()), sys.argv[1:], os.environ.get("OMP_NUM_THREADS"))
mode, first = sys.argv[1], os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
if rank == 1 and first and mode in ("killed", "stop"):
    raise ValueError("no good")
if rank == 1 and mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "deaf":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    pathlib.Path(f"ready-{rank}").touch()
    time.sleep(1000)
if mode == "stop":
    from sheer.distributed.words import departure_status
    from sheer.signals import StopSignals
    with StopSignals() as signals:
        pathlib.Path(f"ready-{rank}").touch()
        while signals.received is None:
            time.sleep(0.05)
    print("saved")
    sys.exit(departure_status())
if mode == "killed" and rank == 0:
    while True:  # in no collective, and so not told by a broken connection
        time.sleep(1)
dist.all_reduce(total)
"""


def running() -> list[str]:
    """Return the ranks whose processes are still there."""
    return [path.name for path in Path.cwd().glob("process-*") if Path(f"/proc/{path.read_text()}").exists()]


def wait_for(*paths: str) -> None:
    end = time.monotonic() + 60
    while not all(Path(path).exists() for path in paths):
        assert time.monotonic() < end, f"{paths} did not come"
        time.sleep(0.05)


def test_ranks_share_a_script_and_the_console_shows_rank_0() -> None:
    status, out, err = launched.run(
        SCRIPT, "--set", "max_steps=3", "--nproc-per-node", "2", "train.py", "well", "--max-restarts=9"
    )
    assert status == 0, err
    said = "of 2 {'max_steps': '3'} ['well', '--max-restarts=9']"
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert out == f"rank 0 {said} {threads}\n"
    first, second = err.splitlines()
    assert first.startswith("sheer run: 2 ranks on this machine; ")
    assert second.startswith("--set max_steps=3 set nothing: train.py built no Trainer"), (
        "it has none, and rank 0 says so"
    )
    for rank, more in ((0, [second]), (1, [])):  # rank 0's are written by two processes, in any order
        lines = Path(f"run/ranks/rank-{rank}.txt").read_text().splitlines()
        assert sorted(lines) == sorted([f"rank {rank} {said} {threads}", *more])


def test_a_rank_that_is_killed_is_named_and_what_failed_before_the_last_start_is_not() -> None:
    status, out, err = launched.run(SCRIPT, "--nproc-per-node", "2", "--max-restarts", "1", "train.py", "killed")
    assert status == 1 and running() == []
    assert out.count("rank 0 of 2") == 2 and Path("process-0-1").exists()
    assert err.splitlines()[1:] == ["Rank 1 failed: killed by SIGKILL (out of memory, most likely)"]


def test_a_signal_is_passed_on_and_the_status_says_that_all_saved_and_left() -> None:
    """Behind a start that failed, which is no more to be seen."""
    process = launched.start(SCRIPT, "--nproc-per-node", "2", "--max-restarts", "2", "train.py", "stop")
    wait_for("ready-0", "ready-1")
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_STATUS and running() == [], err
    assert out.count("rank 0 of 2") == 2 and Path("process-0-1").exists() and not Path("process-0-2").exists()
    assert "saved" in out and "saved" in Path("run/ranks/rank-1.txt").read_text()
    assert "Traceback" not in err and "no good" not in out + err


def test_a_second_signal_kills() -> None:
    process = launched.start(SCRIPT, "--nproc-per-node", "2", "--max-restarts", "1", "train.py", "deaf")
    wait_for("ready-0", "ready-1")
    assert process.stderr is not None
    process.send_signal(signal.SIGTERM)
    while "SIGTERM" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and running() == []


def worked(script: str) -> tuple[int, list[object]]:
    """Run a script as a rank does that `sheer run` has started; returns its status, and what signals do behind it."""
    Path("ends.py").write_text(script)
    sys.argv = ["worker", "ends.py"]
    status = 0
    try:
        work()
    except SystemExit as error:
        status = int(error.code or 0)
    return status, [signal.getsignal(getattr(signal, name)) for name in SIGNALS]


@pytest.mark.parametrize(("script", "status"), [("x = 1", 0), ("raise SystemExit(3)", 3)])
def test_a_rank_that_leaves_is_not_disturbed_by_a_signal(script: str, status: int) -> None:
    """An exception out of what runs at exit would be shown beside the error that ended another rank."""
    assert run_on_ranks(1, worked, script) == [(status, [signal.SIG_IGN] * 3)]


def test_two_launchers_meet_as_two_machines() -> None:
    options = ["--nproc-per-node", "1", "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    processes = [launched.start(SCRIPT, *options, "--node-rank", str(node), "train.py", "well") for node in (1, 0)]
    ends = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert ends[1][0].startswith("rank 0 of 2") and ends[0][0] == ""
    assert "this is number 1, which meet at 127.0.0.1:" in ends[0][1]
