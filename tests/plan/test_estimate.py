"""What is planned is what a training takes: the same script, on paper and on real ranks over gloo."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sheer.cli import app
from sheer.errors import DataError, RunError, SettingsError, SheerError, StepError
from sheer.plan.estimate import Estimate, Held, estimate_script
from sheer.plan.ledger import Traffic
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("trained.py")
WAYS = {
    1: ["alone", "alone in bf16-mixed", "alone in micro-batches"],
    2: ["ddp", "ddp in micro-batches", "fsdp", "fsdp kept after forward", "fsdp in micro-batches", "tp"],
    4: ["fsdp", "hsdp", "tp"],
}


def plans(ways: list[str]) -> list[Estimate]:
    """Plan trainings on this rank."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return [estimate_script(SCRIPT, [way], {}, world_size, rank) for way in ways]


def measurements(ways: list[str]) -> list[tuple[Held, tuple[Traffic, ...], int]]:
    """Train, and return what was measured."""
    from tests.plan.measure import MEASURE

    found = []
    for way in ways:
        sys.argv = [str(SCRIPT), way]
        runpy.run_path(str(SCRIPT), run_name="__main__")
        found.append((MEASURE.held, MEASURE.traffic, MEASURE.most))
    return found


@pytest.mark.parametrize("ranks", WAYS)
def test_each_rank_holds_and_sends_what_was_planned_and_uses_as_much(ranks: int) -> None:
    planned_by_rank = run_on_ranks(ranks, plans, WAYS[ranks], timeout=250)
    measured_by_rank = run_on_ranks(ranks, measurements, WAYS[ranks], timeout=250)
    for planned_here, measured_here in zip(planned_by_rank, measured_by_rank, strict=True):
        for way, plan, (held, traffic, most) in zip(WAYS[ranks], planned_here, measured_here, strict=True):
            assert plan.held == held, way
            assert plan.traffic == traffic and bool(traffic) == (ranks > 1), way
            there = held.parameters + held.buffers + held.optimizer + plan.batch
            there += held.gradients if way.startswith("ddp") else 0  # whose memory DDP keeps between steps
            assert most + 64 >= plan.peak - there, way
            assert most - 64 <= plan.peak - there + (0 if ranks == 1 else 0.05 * most), way  # gloo's, for a moment
            assert plan.activations > held.parameters, way


def planned(script: str, world_size: int, *arguments: str, rank: int = 0, **changes: str) -> Estimate:
    Path("script.py").write_text(textwrap.dedent(script))
    return estimate_script(Path("script.py"), arguments, changes, world_size, rank)


LARGE = """
    import resource, sys, torch, sheer
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    class Windows(Dataset):
        def __len__(self): return 100_000
        def __getitem__(self, index): return torch.arange(512)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.letters = nn.Embedding(128_000, 8192)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8192, 28_672), nn.GELU(), nn.Linear(28_672, 8192)) for _ in range(12))
            self.head = nn.Linear(8192, 128_000, bias=False)
        def forward(self, x):
            x = self.letters(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    model = Net()
    plan = None
    if "tp" in sys.argv:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
        plan = {"blocks.*.0": ColwiseParallel(), "blocks.*.2": RowwiseParallel()}
    trainer = sheer.Trainer(max_steps=1, precision="bf16-mixed", parallel="fsdp" if plan is None else sheer.Parallel(tp=64))
    trainer.fit(
        model, lambda m, b: m(b).float().logsumexp(-1).mean(), DataLoader(Windows(), batch_size=1024),
        optimizer=torch.optim.AdamW(model.parameters(), fused=plan is None), parallelize=plan,
    )
"""


def test_a_model_of_31_gigabytes_is_planned_on_1024_ranks_in_2_gigabytes() -> None:
    Path("large.py").write_text(textwrap.dedent(LARGE))
    program = """
import resource, pathlib
from sheer.plan.estimate import estimate_script
for way in ("fsdp", "tp"):
    found = estimate_script(pathlib.Path("large.py"), [way], {}, 1024)
    print(found.whole.parameters, found.held.parameters)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    whole, by_fsdp, again, by_tp, resident = map(int, done.stdout.split())  # the last in KiB
    vocabulary = 2 * 4 * 128_000 * 8192  # bytes of what only dp_shard divides, in either way
    assert whole == again > 30 * 10**9
    assert by_fsdp == pytest.approx(whole / 1024, rel=0.01)
    assert by_tp == pytest.approx(vocabulary / 16 + (whole - vocabulary) / 1024, rel=0.01)
    assert resident < 2 * 2**20


SMALL = """
    import sys, torch, sheer
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6) if "32" in sys.argv else nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 1))
    def step(model, batch):
        if "looks" in sys.argv and model(batch[0]).sum() > 0:
            return model(batch[0]).sum()
        return model(batch[0]).square().mean()
    parallel = {"pp": sheer.Parallel(pp=2, pp_split=("2",)), "cp": sheer.Parallel(cp=2, seq_dim=1)}.get(sys.argv[-1], "auto")
    parallel = sheer.Parallel(cpu_offload=True) if "offload" in sys.argv else parallel
    trainer = sheer.Trainer(max_steps=3, parallel=parallel, resume="auto", run_dir="run")
    model[0](torch.ones(2, 4))
    loader = [] if "empty" in sys.argv else DataLoader(TensorDataset(torch.ones(64, 4)), batch_size=int(sys.argv[-1]) if sys.argv[-1].isdigit() else 16, shuffle=True)
    if "own" in sys.argv:
        trainer.start(model, optimizers={"a": torch.optim.SGD(model.parameters(), lr=0.1)})
    if "nothing" not in sys.argv:
        trainer.fit(model, step, loader, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
"""


def test_buffers_that_ddp_sends_are_counted() -> None:
    found = planned(SMALL, 8)
    assert found.held.buffers == 6 * 4 * 2 + 8
    assert [each.size for each in found.traffic if each.kind == "broadcast"] == [found.held.buffers]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_gradients_are_sent_once_a_step_however_many_micro_batches_there_are(way: str) -> None:
    whole, parts = (planned(SMALL, 8, "64", micro_batch_size=size, parallel=way) for size in ("8", "2"))
    assert (whole.micro_batches, parts.micro_batches) == (1, 4)
    kinds = ("all-reduce", "reduce-scatter")
    one, many = ([each for each in found.traffic if each.kind in kinds] for found in (whole, parts))
    assert one == many and one


def test_a_plan_leaves_nothing_behind() -> None:
    planned(SMALL, 8)
    assert not Path("run").exists()
    assert planned(SMALL, 1).traffic == ()


def test_settings_are_those_of_the_command_line() -> None:
    found = planned(SMALL, 8, "64", micro_batch_size="4", parallel="fsdp")
    assert (found.micro_batches, found.samples, found.data_ranks) == (2, 64, 8)
    assert {each.kind for each in found.traffic} == {"all-gather", "reduce-scatter"}
    assert planned(SMALL, 8, rank=7).rank == 7


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("pp", SettingsError, "cannot plan pp=2"),
        ("cp", SettingsError, "cannot plan cp=2"),
        ("offload", SettingsError, "cannot plan cpu_offload=True"),
        ("own", SettingsError, "loop of its own"),
        ("nothing", RunError, "without a call of fit"),
        ("looks", StepError, "looks at the values of tensors"),
        ("empty", DataError, "empty"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(what: str, error: type[SheerError], message: str) -> None:
    with pytest.raises(error, match=message):
        planned(SMALL, 4, what)
    import torch.distributed as dist

    assert not dist.is_initialized()


def sheer_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sheer", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_the_command_prints_tables_and_ends_with_1_where_it_does_not_fit() -> None:
    Path("script.py").write_text(textwrap.dedent(SMALL))
    done = sheer_plan("script.py", "--world", "64", "--parallel", "dp_replicate=2", "--device-memory", "a100-40", "32")
    assert done.returncode == 0, done.stderr
    assert "script.py on 64 ranks: HSDP (dp_replicate=2, dp_shard=32)" in done.stdout
    assert "fits: 0% of a100-40 (39.4 GiB)" in done.stdout and "32 data ranks get none" in done.stdout
    assert "reduce-scatter over dp_shard (32)" in done.stdout and "all-reduce over dp_replicate (2)" in done.stdout
    here = CliRunner()  # the same in this process
    assert here.invoke(app, ["plan", "script.py", "--world", "2", "--device-memory", "0.001MB"]).exit_code == 1
    refused = here.invoke(app, ["plan", "script.py", "--world", "2", "--device-memory", "h1000"])
    assert refused.exit_code == 2 and "one of a100-40" in refused.stderr
