"""A small task: regression with dropout, so that data order, random states and weights all show in the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sheer
from sheer.data import GlobalSampler

SAMPLES = 100


def dataset(samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 6, generator=generator)
    y = x @ torch.randn(6, 1, generator=generator) + 0.1 * torch.randn(samples, 1, generator=generator)
    return TensorDataset(x, y)


def model(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    x, y = batch
    prediction = model(x)
    return {"loss": F.mse_loss(prediction, y), "error": (prediction - y).abs().mean()}


def loss_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def loader(batch_size: int = 16, *, shuffle: bool = True, samples: int = SAMPLES, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset(samples), batch_size=batch_size, shuffle=shuffle, **options)


def plain_loader(batch_size: int = 16, samples: int = SAMPLES, seed: int = 0) -> tuple[DataLoader[Any], GlobalSampler]:
    """The loader of a hand-written loop that sees what Sheer sees."""
    data = dataset(samples)
    sampler = GlobalSampler(data, seed=seed)
    return DataLoader(data, batch_size=batch_size, sampler=sampler), sampler


def trainer(**settings: Any) -> sheer.Trainer:
    settings.setdefault("checkpoint", False)
    settings.setdefault(
        "device", "cpu"
    )  # also on a machine with a GPU: what is equal bit for bit is equal on one device
    settings.setdefault("loggers", [sheer.Console(live=False)])
    if not {"max_steps", "max_epochs", "max_time", "fast_dev_run"} & settings.keys():
        settings["max_epochs"] = 3
    return sheer.Trainer(**settings)


def assert_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Every tensor equal bit for bit, and everything else equal."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, b[name]), f"{name} differs by {(value - b[name]).abs().max()}"
        else:
            assert value == b[name], name
