"""What rank 0 says and writes for all ranks, and the others do not."""

from __future__ import annotations

import contextlib
import csv
import io
from pathlib import Path

import sheer
from tests.ranks import run_on_ranks
from tests.task import loader, model, step


def trained() -> tuple[str, str]:
    """Train with all loggers that write files; return what was printed, and where TensorBoard's events lie."""
    from torch.optim import SGD

    net, said = model(), io.StringIO()
    with contextlib.redirect_stdout(said):
        sheer.Trainer(
            max_steps=6,
            device="cpu",
            run_dir="run",
            log_every_n_steps=2,
            checkpoint=False,
            loggers=[sheer.CSV(), sheer.TensorBoard(), sheer.Console(live=False)],
        ).fit(net, step, loader(16), loader(48, shuffle=False), optimizer=SGD(net.parameters(), lr=0.1))
    return said.getvalue(), str(sorted(str(path) for path in Path("run").rglob("events*")))


def test_rank_0_alone_speaks_and_writes() -> None:
    (said, events), (silent, _) = run_on_ranks(2, trained)
    assert "each rank takes its part of every batch" in said and "batch: 16 = 2 ranks x 8" in said
    assert silent == ""
    assert events.count("events.out") == 1
    rows = list(csv.DictReader(Path("run/metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows if row["train/loss"]] == ["2", "4", "6"]
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(rows)
