"""The callbacks on a GPU: the same averages as torch's, and no waiting between log points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import sheer
from tests.task import assert_same, loader, loss_step, model, plain_loader, step, trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def averaged_by_hand(combine: Any) -> AveragedModel:
    torch.use_deterministic_algorithms(True)
    net = model(dropout=0.0).cuda()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    average = AveragedModel(net, multi_avg_fn=combine)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for x, y in batches:
            loss_step(net, (x.cuda(), y.cuda())).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(net)
    return average


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_averages_equal_those_of_averaged_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    average = averaged_by_hand(get_ema_multi_avg_fn(0.9) if kind == "EMA" else get_swa_multi_avg_fn())
    callback: Any = sheer.EMA(0.9) if kind == "EMA" else sheer.SWA(start_step=0, every_n_steps=1, bn_loader=False)
    net = model(dropout=0.0).cuda()
    torch.manual_seed(0)
    trainer(device="cuda", callbacks=[callback]).fit(net, step, loader(), optimizer=AdamW(net.parameters(), lr=1e-2))
    assert_same(callback.averages(), dict(average.module.named_parameters()))


def test_nothing_waits_for_the_device_between_log_points() -> None:

    def strict(step: int, model: nn.Module, batch: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if step % 4 else "default")

    def lax(step: int, model: nn.Module) -> None:
        torch.cuda.set_sync_debug_mode("default")

    callbacks = [
        sheer.On(step_start=strict),
        sheer.EMA(0.9),
        sheer.Throughput(tokens=lambda batch: (batch[0] != 0).sum(), flops_per_sample=1e3),
        sheer.GradientNorm(per_parameter=True),
        sheer.LearningRateMonitor(),
        sheer.DeviceStats(),
        sheer.Timer(),
        sheer.On(step_end=lax),
    ]
    net = model()
    trainer(device="cuda", callbacks=callbacks, max_steps=20, max_epochs=None, log_every_n_steps=4, run_dir="run").fit(
        net, step, loader(), optimizer=AdamW(net.parameters(), lr=1e-2)
    )
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["throughput/mfu"] > 0 and line["throughput/tokens_per_second"] > 0
    assert line["device/memory_peak_gib"] >= line["device/memory_gib"] > 0
    if "device/power_watts" in line:
        assert 10 < line["device/power_watts"] < 2000 and 0 <= line["device/utilization_percent"] <= 100


def test_statistics_of_batch_norms_and_the_random_states_of_the_device() -> None:
    net = model()
    swa = sheer.SWA(start_step=3, every_n_steps=2, lr=0.01, bn_loader=loader(25))
    trainer(device="cuda", callbacks=[swa], checkpoint=True, run_dir="run").fit(
        net, step, loader(), loader(50), optimizer=AdamW(net.parameters(), lr=1e-2)
    )
    averages = swa.averages()
    assert averages is not None and averages["1.running_mean"].device.type == "cuda"
    assert not torch.equal(averages["1.running_mean"], net.state_dict()["1.running_mean"])


def test_the_profile_has_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    net = model()
    trainer(device="cuda", callbacks=[sheer.Profiler(wait=1, warmup=1, active=2)], max_epochs=1, run_dir="run").fit(
        net, step, loader(), optimizer=AdamW(net.parameters(), lr=1e-2)
    )
    assert "cuda" in Path("run/profile/train.4.pt.trace.json").read_text().lower()
    assert "Self CUDA" in capsys.readouterr().out


def test_find_lr() -> None:
    net = model()
    finding = sheer.find_lr(net, step, loader(), AdamW(net.parameters(), lr=1e-3), steps=20)
    assert len(finding.losses) <= 20
