"""What each rank has of its own and is used as one: statistics of batch norms, metric objects, counts, the whole of a model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import device_mesh
from torch.nn import functional as F
from torch.utils.data import DataLoader

import sheer
from sheer.console import silent_console
from tests.distributed.task import CLASSES, FEATURES, Net, data, step, train
from tests.distributed.test_stopping_a_run import ROOT, SCRIPT
from tests.ranks import run_on_ranks


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def with_batch_norms(ways: list[Any]) -> list[dict[str, Any]]:
    out = []
    for way in ways:
        folder = f"runs/{len(out)}"
        run = train(way, make=Normed, folder=folder, max_steps=5, checkpoint=sheer.Checkpoint(every_n_steps=5))
        out.append({**run, "folder": folder})
    return out


@pytest.mark.parametrize(("ranks", "ways"), [(2, ["ddp", "fsdp"]), (4, [sheer.Parallel(dp_replicate=2)])])
def test_validation_and_checkpoint_have_the_same_statistics_of_batch_norms(ranks: int, ways: list[Any]) -> None:
    """Those of rank 0: what the checkpoint is said to be worth is what it is worth."""
    results = run_on_ranks(ranks, with_batch_norms, ways)
    for number in range(len(ways)):
        many = [result[number] for result in results]
        alone = Normed().double()
        sheer.load_weights(alone, many[0]["folder"], which="last")
        saved = alone.state_dict()
        for rank in many:
            for name, value in rank["weights"].items():
                assert torch.equal(value, saved[name]), name
        trainer = sheer.Trainer(max_steps=1, precision="64-true")
        found = trainer.validate(alone, step, DataLoader(data(), batch_size=24))
        assert found == pytest.approx(many[0]["metrics"], abs=1e-12)


def in_16_bits() -> dict[str, float]:
    settings = {"make": Normed, "max_steps": 3, "precision": "bf16-mixed", "optimizer": torch.optim.SGD}
    with pytest.raises(sheer.SettingsError, match=r'layers.1 is a batch norm .* Set Parallel\(param_dtype="float32"\)'):
        train("fsdp", **settings)
    metrics: dict[str, float] = train(sheer.Parallel(param_dtype="float32"), **settings)["metrics"]
    return metrics


def test_batch_norms_that_would_be_gathered_in_16_bits_are_refused() -> None:
    for metrics in run_on_ranks(2, in_16_bits):
        assert 0 < metrics["val/loss"] < 10


def own_share(sizes: list[int]) -> list[Any]:
    """Batches of which each rank makes its own, in such numbers."""
    x, y = data()[:]
    return [(x[start : start + 8], y[start : start + 8]) for start in range(0, 8 * sizes[int(os.environ["RANK"])], 8)]


class Own:
    """A loader that is no sequence: it gives each rank its own batches."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def counted_in_training(sizes: list[int], way: str) -> list[float]:
    """Count samples by an object that keeps its own state, and log at each end of an epoch."""
    from torchmetrics import SumMetric

    seen = SumMetric()

    def counting(model: nn.Module, batch: Any) -> dict[str, Any]:
        seen.update(len(batch[0]))
        return {"loss": F.cross_entropy(model(batch[0]), batch[1]), "seen": seen}

    trainer = sheer.Trainer(
        max_epochs=2,
        parallel=way,  # type: ignore[arg-type]
        log_every_n_steps=max(sizes),
        checkpoint=False,
        run_dir=f"runs/{way}",
        loggers=[silent_console()],
        callbacks=[sheer.Throughput(tokens=lambda batch: len(batch[0]))],
    )
    model = Net().double()
    trainer.fit(model, counting, Own(own_share(sizes)), optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1))
    lines = [json.loads(line) for line in Path(f"runs/{way}/metrics.jsonl").read_text().splitlines()]
    for line in lines:  # each sample is one token
        assert line["throughput/tokens_per_second"] == pytest.approx(line["throughput/samples_per_second"])
    return [line["train/seen"] for line in lines]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_rank_that_has_run_out_counts_nothing_twice(way: str) -> None:
    for seen in run_on_ranks(2, counted_in_training, [4, 2], way):
        assert seen == [48.0, 48.0]


def counted_flops() -> list[Any]:
    """A batch of one sample: the second rank has none, and runs the first for the other's sake."""
    trainer = sheer.Trainer(
        max_steps=2,
        parallel="ddp",
        log_every_n_steps=1,
        checkpoint=False,
        run_dir="runs/flops",
        loggers=[silent_console()],
        callbacks=[sheer.Throughput(flops_per_sample="count", peak_flops=1e9)],
    )
    model = Net().double()
    trainer.fit(model, step, DataLoader(data(), 1), optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1))
    return [json.loads(line)["throughput/mfu"] for line in Path("runs/flops/metrics.jsonl").read_text().splitlines()]


def test_flops_are_counted_where_a_rank_has_no_sample() -> None:
    for values in run_on_ranks(2, counted_flops):
        assert len(values) == 2 and all(value > 0 for value in values)


def summarised(parallel: Any) -> None:
    train(parallel, folder="runs/summary", callbacks=[sheer.ModelSummary(depth=2)], max_steps=1)


@pytest.mark.parametrize(
    "parallel", ["fsdp", sheer.Parallel(pp=2, pp_split=("blocks.1",), pp_micro_batches=4)], ids=["fsdp", "pp"]
)
def test_the_summary_is_of_the_whole_model(parallel: Any) -> None:
    run_on_ranks(2, summarised, parallel)
    text = Path("runs/summary/ranks/rank-0.txt").read_text()
    rows = [line.split() for line in text.splitlines() if line.startswith(("(all)", "  blocks."))]
    whole = Net()
    assert sum(int(row[2].replace(",", "")) for row in rows if row[0] == "(all)") == sum(
        p.numel() for p in whole.parameters()
    )
    assert [row[0] for row in rows if row[0] != "(all)"] == ["blocks.0", "blocks.1"]


class Glued(Net):
    """Does something outside of its modules, which every stage of a pipeline would do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


def glued(parallel: Any) -> str:
    with pytest.raises(sheer.ModelError) as caught:
        train(parallel, make=Glued)
    return str(caught.value)


@pytest.mark.parametrize("ranks", [2, 4])
def test_stages_that_do_not_make_the_model_are_refused_before_the_first_step(ranks: int) -> None:
    parallel = sheer.Parallel(pp=2, pp_split=("blocks.1",), pp_micro_batches=2)
    for said in run_on_ranks(ranks, glued, parallel):
        assert "do not compute what the model computes" in said


def test_predictions_of_the_ranks_in_turn_are_those_of_one_process() -> None:
    parts = run_on_ranks(3, predicted)
    in_turn = [parts[number % 3][number // 3] for number in range(5)]
    assert sum(len(part) for part in parts) == 5
    assert torch.allclose(torch.cat(in_turn), torch.cat(predicted()), atol=1e-12)


def predicted_slowly_joined() -> int:
    """Rank 0 has nobody to wait for once its own groups are made; the others still look for theirs in the store that it holds."""
    if os.environ["RANK"] != "0":
        new_group = device_mesh.new_group
        device_mesh.new_group = lambda *given, **named: (new_group(*given, **named), time.sleep(0.5))[0]
    return len(predicted())


def test_a_rank_that_has_predicted_its_part_leaves_no_other_behind() -> None:
    assert run_on_ranks(3, predicted_slowly_joined) == [2, 2, 1]


def predicted() -> list[Tensor]:
    sheer.seed_everything(0)
    trainer = sheer.Trainer(max_steps=1, precision="64-true")
    return list(trainer.predict(Net(), lambda model, batch: model(batch[0]), DataLoader(data(), batch_size=24)))


def start_torchrun(act: str) -> subprocess.Popen[str]:
    Path("train.py").write_text(SCRIPT.format(root=ROOT, act=act, steps=2000, resume=None, parallel="ddp"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_under_torchrun_a_rank_that_is_told_to_stop_leads_all_to_save_and_end_with_0() -> None:
    process = start_torchrun("os.kill(os.getpid(), signal.SIGTERM) if trainer.rank == 1 and step == 7 else None")
    out, error = process.communicate(timeout=90)
    assert process.returncode == 0, error
    assert "behind fit" not in out
    assert Path("run/checkpoints/last/manifest.json").exists()


def test_torchrun_that_is_told_to_stop_lets_the_ranks_save() -> None:
    process = start_torchrun("pass")
    end = time.monotonic() + 60
    lines = Path("run/metrics.jsonl")
    while time.monotonic() < end and not (lines.exists() and lines.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and "SignalException" in error  # torchrun's own
    assert Path("run/checkpoints/last/manifest.json").exists()
