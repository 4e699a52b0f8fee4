"""Each rank's output is in a file of its own, whatever writes it; the console shows rank 0, and errors."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]


def write(folder: Path) -> str:
    from sheer.distributed.output import close_output, open_output

    rank = int(os.environ["RANK"])
    console = os.open(folder / f"console-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(console, 1)
    os.dup2(console, 2)
    open_output(folder / "first", rank)
    open_output(folder, rank)  # of another run
    print("print")
    sys.stdout.flush()
    os.write(2, b"library\n")
    subprocess.run(["echo", "child"], check=True)
    close_output()
    print("after", flush=True)
    return (folder / f"console-{rank}").read_text()


def test_a_rank_writes_to_its_file_and_rank_0_to_the_console_too(tmp_path: Path) -> None:
    said = "print\nlibrary\nchild\n"
    assert run_on_ranks(2, write, tmp_path) == [f"{said}after\n", "after\n"]
    assert [Path(tmp_path, f"ranks/rank-{rank}.txt").read_text() for rank in (0, 1)] == [said, said]


SCRIPT = """
import os, pathlib, sys
from sheer.distributed.output import open_output
open_output(pathlib.Path("run"), int(os.environ["RANK"]))
print("terminal", sys.stdout.isatty(), os.get_terminal_size().columns if sys.stdout.isatty() else None)
raise ValueError("no good")
"""


def test_an_error_of_another_rank_reaches_the_console_once() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "3"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "[rank 3] Traceback (most recent call last):" and lines[-1] == "[rank 3] ValueError: no good"
    assert done.stderr.count("no good") == 1
    text = Path("run/ranks/rank-3.txt").read_text()
    assert text.startswith("terminal False None\nTraceback") and text.count("no good") == 1


def test_rank_0_keeps_its_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, stdout=theirs, stderr=theirs)
    assert process.wait(60) == 1
    text = os.read(ours, 10000).decode()
    assert text.startswith("terminal True ") and "ValueError: no good" in text
    assert Path("run/ranks/rank-0.txt").read_text() == text.replace("\r\n", "\n")
