"""`fit` against loops written by hand in PyTorch: the same weights, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

import sheer
from tests.task import assert_same, dataset, loader, loss_step, model, plain_loader, step, trainer


def optimizer_of(net: nn.Module, **options: Any) -> Optimizer:
    return AdamW(net.parameters(), lr=1e-2, **options)


def fitted(net: nn.Module, optimizer: Optimizer, scheduler: Any = None, step: Any = step, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    trainer(**settings).fit(net, step, loader(), optimizer=optimizer, scheduler=scheduler)
    return net


def test_the_plainest_loop() -> None:
    net = model()
    optimizer = optimizer_of(net)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    net.train()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for x, y in batches:
            loss = F.mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    other = model()
    assert_same(fitted(other, optimizer_of(other)).state_dict(), net.state_dict())


@pytest.mark.parametrize("precision", ["bf16-mixed", "tf32-true"])
def test_precision(precision: Any) -> None:
    net = model()
    optimizer = optimizer_of(net)
    torch.manual_seed(0)
    if precision == "tf32-true":
        torch.set_float32_matmul_precision("high")
    batches, sampler = plain_loader()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = loss_step(net, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    other = model()
    assert_same(fitted(other, optimizer_of(other), precision=precision).state_dict(), net.state_dict())
    assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32-true" else "highest")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_true_precision_converts_model_and_batches(precision: Any, dtype: torch.dtype) -> None:
    net = model().to(dtype)
    optimizer = optimizer_of(net)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for x, y in batches:
            loss_step(net, (x.to(dtype), y.to(dtype))).backward()
            optimizer.step()
            optimizer.zero_grad()

    other = model()
    assert_same(fitted(other, optimizer_of(other), precision=precision).state_dict(), net.state_dict())


def test_16_mixed_unscales_before_clipping_and_holds_the_scheduler_on_skipped_steps() -> None:
    def overflowing(net: nn.Module, batch: Any, step: int) -> Tensor:
        loss = loss_step(net, batch)
        return loss * (1e34 if step in (3, 4, 9) else 1.0)  # times the scale this is infinite

    net = model()
    optimizer = optimizer_of(net)
    scheduler = StepLR(optimizer, 1, gamma=0.9)
    scaler = torch.amp.GradScaler("cpu")
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    number = skipped = 0
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            number += 1
            with torch.autocast("cpu", torch.float16):
                loss = overflowing(net, batch, number)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scaler.get_scale() >= before:
                scheduler.step()
            else:
                skipped += 1
    assert skipped >= 3

    other = model()
    other_optimizer = optimizer_of(other)
    other_scheduler = StepLR(other_optimizer, 1, gamma=0.9)
    fitted(other, other_optimizer, other_scheduler, overflowing, precision="16-mixed", gradient_clip_val=0.5)
    assert_same(other.state_dict(), net.state_dict())
    assert other_scheduler.state_dict() == scheduler.state_dict()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_clipping_also_with_fused_optimizers_under_autocast(algorithm: Any, fused: bool, mixed: bool) -> None:
    net = model()
    optimizer = optimizer_of(net, fused=fused)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = loss_step(net, batch)
            loss.backward()
            if algorithm == "norm":
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            else:
                nn.utils.clip_grad_value_(net.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()

    other = model()
    settings = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm}
    precision = "bf16-mixed" if mixed else "32-true"
    assert_same(
        fitted(other, optimizer_of(other, fused=fused), precision=precision, **settings).state_dict(), net.state_dict()
    )


def test_micro_batches_weigh_by_their_samples_also_in_the_last_shorter_batch() -> None:
    net = model()
    optimizer = optimizer_of(net)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for x, y in batches:
            for start in range(0, len(x), 6):  # 16 = 6 + 6 + 4; the last batch has 4
                part = x[start : start + 6], y[start : start + 6]
                loss = loss_step(net, part)
                (loss if len(part[0]) == len(x) else loss * (len(part[0]) / len(x))).backward()
            optimizer.step()
            optimizer.zero_grad()

    other = model()
    assert_same(fitted(other, optimizer_of(other), micro_batch_size=6).state_dict(), net.state_dict())


def test_accumulation_has_one_denominator_also_in_the_last_shorter_window() -> None:
    net = model()
    optimizer = optimizer_of(net)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        held = list(batches)  # 7 batches: windows of 3, 3 and 1, the last of 4 samples
        for start in range(0, len(held), 3):
            window = held[start : start + 3]
            total = sum(len(x) for x, _ in window)
            for x, y in window:
                loss = loss_step(net, (x, y))
                (loss if len(x) == total else loss * (len(x) / total)).backward()
            optimizer.step()
            optimizer.zero_grad()

    other = model()
    result = fitted(other, optimizer_of(other), accumulate_grad_batches=3)
    assert_same(result.state_dict(), net.state_dict())


def test_gradients_of_the_last_window_are_not_divided_by_the_full_number() -> None:
    """With a linear loss the gradient of every window is the same, whatever its size (peers give 1.0, 1.0, 0.5)."""
    seen = []

    class Seen:
        def on_gradients(self, step: int, model: nn.Module) -> None:
            seen.append(model.weight.grad.item())  # type: ignore[union-attr, operator]

    net = nn.Linear(1, 1, bias=False)
    data = torch.utils.data.TensorDataset(torch.ones(10, 1))
    trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[Seen()]).fit(
        net,
        lambda m, batch: m(batch[0]).mean(),
        torch.utils.data.DataLoader(data, batch_size=2),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
    )
    assert seen == [1.0, 1.0, 1.0]


def masked(net: nn.Module, batch: Any) -> sheer.Mean:
    x, y = batch
    return sheer.mean((net(x) - y) ** 2, mask=(y > 0))


def test_a_mean_divides_by_its_own_count_in_one_batch() -> None:
    net = model(dropout=0.0)
    optimizer = optimizer_of(net)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for x, y in batches:
            mask = (y > 0).float()
            (((net(x) - y) ** 2 * mask).sum() / mask.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()

    other = model(dropout=0.0)
    assert_same(fitted(other, optimizer_of(other), step=masked).state_dict(), net.state_dict())


@pytest.mark.parametrize(
    ("batch_size", "settings"),
    [(16, {"micro_batch_size": 5}), (8, {"accumulate_grad_batches": 2}), (4, {"accumulate_grad_batches": 4})],
)
def test_a_mean_has_one_denominator_over_micro_batches(batch_size: int, settings: dict[str, Any]) -> None:
    """Unequal counts in the micro-batches: the gradient is that of the whole batch, to rounding."""

    def net_of() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    whole, parts = net_of(), net_of()
    for net, size, more in ((whole, 16, {}), (parts, batch_size, settings)):
        torch.manual_seed(0)
        trainer(precision="64-true", max_epochs=3, **more).fit(
            net, masked, loader(size), optimizer=torch.optim.SGD(net.parameters(), lr=0.1)
        )
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-12, atol=1e-13)


def test_a_mean_of_nothing_gives_no_gradient() -> None:
    net = nn.Linear(6, 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trainer(max_steps=2).fit(
        net,
        lambda m, batch: sheer.mean((m(batch[0]) - batch[1]) ** 2, mask=torch.zeros_like(batch[1])),
        loader(),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
    )
    assert_same(net.state_dict(), before)


def test_a_scheduler_per_step() -> None:
    net = model()
    optimizer = optimizer_of(net)
    scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=21)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            loss_step(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    other = model()
    fitted(other, optimizer_of(other), lambda optimizer, total: OneCycleLR(optimizer, max_lr=0.05, total_steps=total))
    assert_same(other.state_dict(), net.state_dict())


def test_a_scheduler_per_epoch() -> None:
    net = model()
    optimizer = optimizer_of(net)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            loss_step(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()

    other = model()
    other_optimizer = optimizer_of(other)
    fitted(other, other_optimizer, StepLR(other_optimizer, 1, gamma=0.5), scheduler_interval="epoch")
    assert_same(other.state_dict(), net.state_dict())


@pytest.mark.parametrize("interval", ["validation", "plateau"])
def test_a_scheduler_per_validation_and_a_plateau(interval: str) -> None:
    def scheduler_of(optimizer: Optimizer, total: int = 0) -> Any:
        if interval == "plateau":
            return ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.5)
        return StepLR(optimizer, 1, gamma=0.7)

    net = model()
    optimizer = optimizer_of(net)
    scheduler = scheduler_of(optimizer)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    valid = loader(32, shuffle=False)
    number = 0
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            loss_step(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            number += 1
            if number % 5 == 0 or number == 21:
                net.eval()
                with torch.no_grad():
                    losses = [(loss_step(net, b).item(), len(b[0])) for b in valid]
                net.train()
                if number % 5 == 0:
                    value = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
                    scheduler.step(*([value] if interval == "plateau" else []))

    other = model()
    torch.manual_seed(0)
    trainer(
        validate_every_n_steps=5,
        monitor="val/loss",
        scheduler_interval="validation" if interval == "validation" else "step",
    ).fit(other, step, loader(), loader(32, shuffle=False), optimizer=optimizer_of(other), scheduler=scheduler_of)
    assert_same(other.state_dict(), net.state_dict())


def test_parameter_groups_and_frozen_parameters() -> None:
    def build() -> tuple[nn.Module, Optimizer]:
        net = model()
        net[0].requires_grad_(False)
        groups = [{"params": net[1].parameters(), "weight_decay": 0.0}, {"params": net[4].parameters(), "lr": 1e-3}]
        return net, AdamW(groups, lr=1e-2)

    net, optimizer = build()
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            loss_step(net, batch).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()

    other, other_optimizer = build()
    assert_same(fitted(other, other_optimizer, gradient_clip_val=0.5).state_dict(), net.state_dict())


def test_the_optimizer_can_be_a_function_of_the_model() -> None:
    first, second = model(), model()
    fitted(first, optimizer_of(first))
    torch.manual_seed(0)
    trainer().fit(second, step, loader(), optimizer=lambda net: AdamW(net.parameters(), lr=1e-2))
    assert_same(first.state_dict(), second.state_dict())


def test_nonfinite_skip_leaves_out_the_bad_steps() -> None:
    def sometimes(net: nn.Module, batch: Any, step: int) -> Tensor:
        return loss_step(net, batch) * (float("nan") if step in (2, 7) else 1.0)

    net = model()
    optimizer = optimizer_of(net)
    scheduler = StepLR(optimizer, 1, gamma=0.9)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    number = 0
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            number += 1
            sometimes(net, batch, number).backward()
            if number not in (2, 7):
                optimizer.step()
                scheduler.step()
            optimizer.zero_grad()

    other = model()
    other_optimizer = optimizer_of(other)
    fitted(other, other_optimizer, StepLR(other_optimizer, 1, gamma=0.9), sometimes, nonfinite="skip")
    assert_same(other.state_dict(), net.state_dict())


def test_validation_gives_the_metrics_of_the_whole_set_and_leaves_modes_alone() -> None:
    net = model()
    net[1].eval()  # a normalisation that is frozen by hand stays so
    torch.manual_seed(0)
    result = trainer(max_epochs=2).fit(net, step, loader(), loader(7, shuffle=False), optimizer=optimizer_of(net))
    assert net.training and not net[1].training

    net.eval()
    x, y = dataset().tensors
    with torch.no_grad():
        expected = F.mse_loss(net(x), y).item()
    assert result.metrics["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert result.step == 14 and result.epoch == 2 and result.stopped_by == "max_epochs"


def test_training_metrics_are_weighted_means_since_the_last_log_point() -> None:
    net = model()
    optimizer = optimizer_of(net)
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    sums, lines, number = [0.0, 0], [], 0
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for x, y in batches:
            loss = loss_step(net, (x, y))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sums[0] += loss.item() * len(x)
            sums[1] += len(x)
            number += 1
            if number % 5 == 0 or number == 14:
                lines.append((number, sums[0] / sums[1]))
                sums = [0.0, 0]

    other = model()
    fitted(other, optimizer_of(other), max_epochs=2, log_every_n_steps=5, run_dir="run")
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [number for number, _ in lines]
    for record, (_, expected) in zip(records, lines, strict=True):
        assert record["train/loss"] == pytest.approx(expected, rel=1e-12)
