"""EMA against torch's AveragedModel in loops written by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sheer
from tests.task import assert_same, loader, loss_step, model, plain_loader, step, trainer
from tests.test_resume import assert_resumes_exactly


def averaged_by_hand(every: int = 1, after: int = 0) -> tuple[nn.Module, AveragedModel]:
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    torch.manual_seed(0)
    batches, sampler = plain_loader()
    number = 0
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            loss_step(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            number += 1
            if number > after and number % every == 0:
                average.update_parameters(net)
    return net, average


def valid() -> list[Any]:
    return list(
        loader(32, shuffle=False)
    )  # a DataLoader draws from the generator when it is iterated, and dropout would see


def fitted(ema: sheer.EMA, *more: Any, **settings: Any) -> nn.Module:
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    held = valid()
    torch.manual_seed(0)
    trainer(callbacks=[ema, *more], **settings).fit(net, step, loader(), held, optimizer=optimizer)
    return net


@pytest.mark.parametrize(("every", "after"), [(1, 0), (3, 0), (2, 10)])
def test_equals_averaged_model(every: int, after: int) -> None:
    net, average = averaged_by_hand(every, after)
    ema = sheer.EMA(0.9, every_n_steps=every, start_step=after)
    assert_same(fitted(ema).state_dict(), net.state_dict())
    averages = ema.averages()
    assert averages is not None
    assert_same(averages, dict(average.module.named_parameters()))


def test_validation_is_of_the_averages_of_its_own_step() -> None:
    _, average = averaged_by_hand()
    seen: list[dict[str, Tensor]] = []

    class Look:
        def on_evaluation_start(self, model: nn.Module) -> None:
            seen.append({name: value.clone() for name, value in model.state_dict().items()})

    fitted(sheer.EMA(0.9), Look())
    assert_same(seen[-1], average.module.state_dict())


def test_test_uses_the_averages_and_leaves_the_trained_weights() -> None:
    net, average = averaged_by_hand()
    ema = sheer.EMA(0.9)
    made = trainer(callbacks=[ema])
    other = model()
    torch.manual_seed(0)
    made.fit(other, step, loader(), optimizer=AdamW(other.parameters(), lr=1e-2))
    tested = made.test(other, step, loader(32, shuffle=False))
    assert tested == trainer().test(average.module, step, loader(32, shuffle=False))
    assert_same(other.state_dict(), net.state_dict())


def test_an_evaluation_within_a_prediction_is_of_the_averages_too_and_another_model_is_left_alone() -> None:
    ema = sheer.EMA(0.5)
    net, other, held = model(), model(), loader(32, shuffle=False)
    made = trainer(callbacks=[ema])
    made.fit(net, step, loader(), optimizer=AdamW(net.parameters(), lr=1e-2))
    trained = {name: value.clone() for name, value in net.state_dict().items()}
    expected = made.test(net, step, held)
    for _ in made.predict(net, step, held):
        assert made.test(net, step, held) == expected
        assert made.test(other, step, held) == trainer().test(other, step, held)
    assert_same(net.state_dict(), trained)


def test_no_storage_of_the_model_is_replaced() -> None:
    net = model()
    places = [p.data_ptr() for p in net.parameters()]
    trainer(callbacks=[sheer.EMA()]).fit(
        net, step, loader(), loader(32, shuffle=False), optimizer=SGD(net.parameters(), lr=0.1)
    )
    assert [p.data_ptr() for p in net.parameters()] == places


def test_checkpoints_hold_the_averages_and_the_trained_weights_beside_them() -> None:
    net, average = averaged_by_hand()
    fitted(sheer.EMA(0.9), checkpoint=True, run_dir="run")
    assert_same(load_file("run/checkpoints/last/model.safetensors"), average.module.state_dict())
    assert_same(load_file("run/checkpoints/last/training.safetensors"), net.state_dict())


def test_tied_parameters_are_averaged_under_all_their_names() -> None:
    net = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    net["b"].weight = net["a"].weight

    def loss(net: Any, batch: Any) -> Tensor:
        return loss_step(nn.Sequential(net["a"], net["b"]), (batch[0], batch[0]))

    trainer(callbacks=[sheer.EMA(0.9)], checkpoint=True, run_dir="run").fit(
        net, loss, loader(), optimizer=SGD(net.parameters(), lr=0.1)
    )
    saved = load_file("run/checkpoints/last/model.safetensors")
    assert torch.equal(saved["a.weight"], saved["b.weight"])
    assert not torch.equal(saved["a.weight"], net["a"].weight)


def test_sixteen_bit_weights_are_averaged_in_float32() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)
    ema = sheer.EMA(0.999)

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return -net.weight.sum()  # type: ignore[union-attr, operator]

    trainer(callbacks=[ema], precision="bf16-true", max_steps=11, max_epochs=None).fit(
        net, loss, loader(), optimizer=SGD(net.parameters(), lr=0.125)
    )
    weight = [1 + 0.125 * number for number in range(1, 12)]
    expected = weight[0]
    for value in weight[1:]:
        expected += 0.001 * (value - expected)
    averages = ema.averages()
    assert averages is not None and averages["weight"].dtype == torch.float32
    assert averages["weight"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stop", [2, 5, 7, 16])
def test_resumes_exactly(stop: int) -> None:
    assert_resumes_exactly(stop, make_callbacks=lambda: [sheer.EMA(0.9, start_step=3)])
    assert_same(
        load_file("whole/checkpoints/last/model.safetensors"), load_file("stopped/checkpoints/last/model.safetensors")
    )


def test_a_finished_run_that_is_resumed_is_tested_with_its_averages() -> None:
    def made() -> tuple[sheer.Trainer, nn.Module]:
        net = model()
        made = trainer(callbacks=[sheer.EMA(0.9)], run_dir="run", resume="auto", checkpoint=True)
        made.fit(net, step, loader(), optimizer=AdamW(net.parameters(), lr=1e-2))
        return made, net

    results = [made.test(net, step, loader(32, shuffle=False)) for made, net in (made(), made())]
    assert results[0] == results[1]


def test_two_optimizers_are_averaged_once_a_step() -> None:
    def both() -> nn.ModuleDict:
        torch.manual_seed(2)
        return nn.ModuleDict({"d": nn.Linear(6, 1), "g": nn.Linear(6, 1)})

    def d_step(net: Any, batch: Any) -> Tensor:
        return loss_step(net["d"], batch)

    def g_step(net: Any, batch: Any) -> Tensor:
        return loss_step(net["g"], batch) + net["d"](batch[0]).mean()

    net = both()
    optimizers = {name: SGD(net[name].parameters(), lr=0.1) for name in ("d", "g")}
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    batches, _ = plain_loader()
    for batch in batches:
        for name, one_step in (("d", d_step), ("g", g_step)):
            optimizers[name].zero_grad()
            one_step(net, batch).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
        average.update_parameters(net)

    other, ema = both(), sheer.EMA(0.9)
    others = {name: SGD(other[name].parameters(), lr=0.1) for name in ("d", "g")}
    torch.manual_seed(0)
    run = trainer(callbacks=[ema], max_epochs=1).start(other, optimizers=others)
    for batch in run.steps(loader()):
        run.update(others["d"], d_step, batch)
        run.update(others["g"], g_step, batch)
    run.finish()
    averages = ema.averages()
    assert averages is not None
    assert_same(averages, dict(average.module.named_parameters()))


def test_a_second_fit_starts_anew() -> None:
    ema = sheer.EMA(0.9)
    fitted(ema)
    first = {name: value.clone() for name, value in (ema.averages() or {}).items()}
    fitted(ema)
    assert_same(ema.averages() or {}, first)


def test_a_step_costs_three_python_calls_of_ours() -> None:
    calls: list[str] = []

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.endswith(("callbacks/ema.py", "sheer/averaging.py")):
            calls.append(frame.f_code.co_name)

    def profiled(step: int, model: nn.Module, batch: Any) -> None:
        sys.setprofile(None)
        if step < 5:  # at the last step the validation asks for the average first
            calls.clear()
            sys.setprofile(count)

    try:
        fitted(sheer.EMA(0.9), sheer.On(step_start=profiled), max_steps=5)
    finally:
        sys.setprofile(None)
    assert calls[:3] == ["on_update", "on_step_end", "average"]


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(sheer.SettingsError, match=r"from 0 to 1"):
        sheer.EMA(1.5)
    with pytest.raises(sheer.SettingsError, match="at least 1"):
        sheer.EMA(every_n_steps=0)
    with pytest.raises(sheer.SettingsError, match="EMA and EMA"):
        fitted(sheer.EMA(), sheer.EMA())
    assert not Path("runs").exists()
