"""float8 as a precision: which layers, that nothing else changes, and what is said where it cannot be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sheer
from sheer.distributed.tensors import whole
from sheer.float8 import is_float8, layers_for_float8
from tests.ranks import run_on_ranks
from tests.task import assert_same, trainer
from tests.test_resume import StopAt

pytest.importorskip("torchao")
emulated = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run be on the CPU, where torchao rounds to float8 and multiplies in float32."""
    monkeypatch.setattr("sheer.float8.check_float8_device", lambda device: None)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)  # 12 is no multiple of 16
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.tied, self.table = nn.Linear(32, 16, bias=False), nn.Embedding(16, 32)
        self.table.weight = self.tied.weight
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + F.gelu(block(x))
        return self.head(self.tied(x))


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def fit(precision: str, **settings: Any) -> tuple[Net, sheer.Result]:
    sheer.seed_everything(0)
    model = Net()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(96, 12, generator=generator)
    loader = DataLoader(TensorDataset(x, x.argmax(-1)), batch_size=16, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = trainer(precision=precision, max_steps=12, checkpoint=True, **settings)
    return model, made.fit(model, step, loader, loader, optimizer=optimizer)


@emulated
def test_layers_that_fit_compute_in_float8_and_nothing_else_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_eight, result = fit("float8-mixed", run_dir=str(tmp_path / "a"))
    assert "float8: 2 of 5 linear layers" in capsys.readouterr().out
    assert [name for name, module in in_eight.named_modules() if is_float8(module)] == ["blocks.0", "blocks.1"]
    in_sixteen, other = fit("bf16-mixed", run_dir=str(tmp_path / "b"))
    assert "float8" not in capsys.readouterr().out
    assert result.metrics["val/loss"] == pytest.approx(other.metrics["val/loss"], rel=2e-2)
    assert result.metrics["val/loss"] != other.metrics["val/loss"]

    kinds = [[(n, v.dtype, v.shape) for n, v in model.state_dict().items()] for model in (in_eight, in_sixteen)]
    assert kinds[0] == kinds[1]
    weights = [{n: v.clone() for n, v in model.state_dict().items()} for model in (in_eight, in_sixteen)]
    sheer.load_weights(in_sixteen, result.run_dir, "last")
    sheer.load_weights(in_eight, other.run_dir, "last")
    assert_same(in_sixteen.state_dict(), weights[0])
    assert_same(in_eight.state_dict(), weights[1])


@emulated
def test_a_run_in_float8_goes_on_bit_for_bit_and_is_tested_in_it(tmp_path: Path) -> None:
    whole_run, _ = fit("float8-mixed", run_dir=str(tmp_path / "whole"))
    with pytest.raises(SystemExit):
        fit("float8-mixed", run_dir=str(tmp_path / "a"), resume="auto", callbacks=[StopAt(7)])
    resumed, _ = fit("float8-mixed", run_dir=str(tmp_path / "a"), resume="auto")
    assert_same(resumed.state_dict(), whole_run.state_dict())

    x = torch.randn(32, 12)
    loader = DataLoader(TensorDataset(x, x.argmax(-1)), batch_size=16)
    losses = []
    for precision in ("float8-mixed", "bf16-mixed"):
        model = Net()
        made = trainer(precision=precision, max_steps=1, run_dir=str(tmp_path / "a"))
        losses.append(made.test(model, step, loader, checkpoint="last")["test/loss"])
        assert sum(map(is_float8, model.modules())) == (2 if precision == "float8-mixed" else 0)
    assert losses[0] == pytest.approx(losses[1], rel=3e-2) and losses[0] != losses[1]


@emulated
def test_a_choice_of_ones_own_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = Net()
    convert_to_float8_training(
        model, module_filter_fn=lambda module, name: name == "blocks.1", config=Float8LinearConfig(emulate=True)
    )
    x = torch.randn(32, 12)
    loader = DataLoader(TensorDataset(x, x.argmax(-1)), batch_size=16)
    made = trainer(precision="float8-mixed", max_steps=2, run_dir=str(tmp_path))
    made.fit(model, step, loader, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert "float8: 1 of 5 linear layers" in capsys.readouterr().out


def test_layers_are_left_out_by_size_by_place_and_where_they_share() -> None:
    assert layers_for_float8(Net()) == ["blocks.0", "blocks.1"]
    assert layers_for_float8(nn.Linear(32, 32)) == []
    assert layers_for_float8(nn.TransformerEncoderLayer(32, 2, 64)) == ["linear1"]


def refused(model: nn.Module, error: type[Exception], said: str) -> None:
    loader = [(torch.randn(16, 16), torch.zeros(16, dtype=torch.int64))]
    with pytest.raises(error, match=said):
        trainer(precision="float8-mixed", max_steps=1).fit(
            model, step, loader, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
        )


def test_a_device_without_float8_is_refused() -> None:
    refused(nn.Linear(16, 16), sheer.SettingsError, r"capability 8\.9 or more, such as an H100, and the device is cpu")


@emulated
def test_a_model_without_a_layer_that_fits_is_refused() -> None:
    refused(nn.Sequential(nn.Linear(16, 9), nn.Linear(9, 16)), sheer.ModelError, "Sequential has none that fits")


@emulated
def test_without_torchao_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    refused(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), sheer.MissingPackageError, r"sheer\[float8\]")


def on_two(parallel: Any) -> tuple[dict[str, Tensor], int] | str:
    import sheer.float8

    sheer.float8.check_float8_device = lambda device: None
    try:
        model, _ = fit("float8-mixed", parallel=parallel, run_dir=f"runs/{parallel}"[:12])
    except sheer.SettingsError as error:
        return str(error)
    return {n: whole(v.detach()).clone() for n, v in model.state_dict().items()}, sum(map(is_float8, model.modules()))


def ways() -> list[Any]:
    return [on_two("ddp"), on_two("fsdp"), on_two(sheer.Parallel(dp_shard=1, tp=2))]


@emulated
def test_ranks_train_in_float8_or_refuse_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = fit("float8-mixed", run_dir="runs/one")
    first, second = run_on_ranks(2, ways)
    for results in (first, second):
        for weights, converted in results[:2]:
            assert converted == 2
            for name, value in model.state_dict().items():
                assert (weights[name] - value).abs().max() < 0.05 * value.abs().max(), name
        assert "was not tried with tp=2" in results[2]
