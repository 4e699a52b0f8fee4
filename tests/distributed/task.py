"""A small run that every way of dividing it must repeat: the same samples, losses and weights as on one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sheer
from sheer.console import silent_console
from sheer.distributed.tensors import whole

SAMPLES, FEATURES, CLASSES = 100, 12, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) if self.embed is not None else x
        for block in self.blocks:
            x = block(x)
        return self.head(x) if self.head is not None else x


def tensor_plan() -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}


def data(dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=dtype)
    return TensorDataset(x, x[:, :CLASSES].argmax(-1))


def step(model: nn.Module, batch: Any) -> dict[str, Any]:
    logits = model(batch[0])
    return {"loss": F.cross_entropy(logits, batch[1]), "accuracy": (logits.argmax(-1) == batch[1]).double().mean()}


def mean_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    """A loss over some of the samples only, so that each rank counts another number."""
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return {"loss": sheer.mean(losses, batch[1] != 0)}


def train(
    parallel: Any = "auto",
    *,
    run_step: Callable[..., Any] = step,
    optimizer: Callable[..., Any] = torch.optim.AdamW,
    scheduler: Any = None,
    as_function: bool = False,
    plan: Any = None,
    loader: Callable[[TensorDataset], Any] = lambda dataset: DataLoader(dataset, batch_size=16, shuffle=True),
    val_loader: Callable[[TensorDataset], Any] = lambda dataset: DataLoader(dataset, batch_size=24),
    make: Callable[[], nn.Module] | None = None,
    folder: str = "runs/here",
    **settings: Any,
) -> dict[str, Any]:
    """Train, and return what was logged and what came of it, whole."""
    sheer.seed_everything(0)
    model = (make or Net)()
    settings = {"max_steps": 20, "precision": "64-true", "log_every_n_steps": 1, "checkpoint": False, **settings}
    dataset = data(torch.float64 if settings["precision"] == "64-true" else torch.float32)
    trainer = sheer.Trainer(
        parallel=parallel,
        run_dir=folder,
        **{"loggers": [silent_console()], **settings},
    )
    result = trainer.fit(
        model,
        run_step,
        loader(dataset),
        val_loader(dataset),
        optimizer=(lambda m: optimizer(m.parameters(), lr=1e-2))
        if as_function
        else optimizer(model.parameters(), lr=1e-2),
        scheduler=scheduler,
        parallelize=plan,
    )
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return {
        "step": result.step,
        "stopped_by": result.stopped_by,
        "metrics": result.metrics,
        "lines": [{name: value for name, value in line.items() if name != "time"} for line in lines],
        "weights": {
            name: whole(value.detach()).cpu().clone() for name, value in model.state_dict().items()
        },  # of some stages
    }


def assert_same(one: dict[str, Any], many: dict[str, Any], *, logged: float, weights: float) -> None:
    """Logged values within an absolute difference, weights within one that is relative to the largest of each tensor."""
    assert (one["step"], one["stopped_by"]) == (many["step"], many["stopped_by"])
    assert len(one["lines"]) == len(many["lines"]) > 1
    for line, other in zip(one["lines"], many["lines"], strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert value == pytest.approx(other[name], rel=0, abs=logged, nan_ok=True), f"{name} at step {line['step']}"
    assert many["weights"]
    for name, value in one["weights"].items():
        assert (
            name not in many["weights"] or (many["weights"][name] - value).abs().max() <= weights * value.abs().max()
        ), name
