"""Handwritten digits, the short way."""

# From `digits.py`, by `sheer eject` 0.1.0 (Apache License 2.0), for one process (set parallel="ddp" or "fsdp" for several ranks); it is yours, to change as you like.
# Settings: max_epochs=5, precision='bf16-mixed', gradient_clip_val=1.0, checkpoint=False.

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import itertools
import json
import numpy as np
import random
import time
from collections.abc import Iterator
from pathlib import Path
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from typing import Any

MAX_EPOCHS = 5  # stop after this many passes over the training data
GRADIENT_CLIP_VAL = 1.0  # clip gradients to this norm, or to this absolute value
LOG_EVERY_N_STEPS = 50  # steps between two log points; the only points where the host waits for the device
RUN_DIR = time.strftime("runs/digits/%Y-%m-%d_%H-%M-%S")  # the folder of the run


class Metrics:
    """Weighted means of what steps return. Adding does not wait for the device; reading does."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[Any, int]]] = {}

    def add(self, output: Any, samples: int) -> None:
        """Add what a step returned for a batch of `samples`."""
        for name, value in output.items():
            kept = value.detach().clone() if isinstance(value, Tensor) else value
            self.rows.setdefault(name, []).append((kept, samples))

    def read(self) -> dict[str, float]:
        """Return the means, and start anew."""
        rows, self.rows = self.rows, {}
        return {
            name: sum(float(value) * samples for value, samples in values) / sum(samples for _, samples in values)
            for name, values in rows.items()
        }


def epochs(loader: Any, device: torch.device) -> Iterator[tuple[Any, bool]]:
    """Yield batches, and whether each ends its epoch, whose order depends on the seed and its number alone."""
    seed = torch.initial_seed()
    for epoch in itertools.count():
        mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
        loader.sampler.generator = torch.Generator().manual_seed(mixed)
        for number, batch in enumerate(loader, 1):
            loader.sampler.generator = None  # the epoch's order is drawn
            yield [tensor.to(device, non_blocking=True) for tensor in batch], number == len(loader)


def report(run_dir: Path, step: int, epoch: int, measured: dict[str, float]) -> None:
    """Hand metrics to the loggers and the console."""
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": round(time.time(), 3), "epoch": epoch, **measured}) + "\n")
    print(f"step {step:,}", *(f"{name} {value:.4g}" for name, value in measured.items()), sep=" · ", flush=True)


def evaluate(
    model: nn.Module, step_function: Any, loaders: Any, device: torch.device, autocast: torch.autocast
) -> dict[str, float]:
    """Return the weighted means of what the step returns, over all batches."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    metrics = Metrics()
    for batch in loaders:
        samples = len(batch[0])
        batch = [tensor.to(device, non_blocking=True) for tensor in batch]
        with torch.no_grad(), autocast:
            output = step_function(model, batch)
        metrics.add(output, samples)
    means = {"val/" + name: value for name, value in metrics.read().items()}
    for module in training:
        module.training = True
    return means


def fit(model: nn.Module, step_function: Any, train_loader: Any, val_loader: Any, optimizer: Optimizer) -> None:
    """Train the model."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    model.to(device)
    run_dir = Path(RUN_DIR)
    run_dir.mkdir(parents=True, exist_ok=False)
    parameters = list(model.parameters())
    step = 0
    epoch = 0
    metrics = Metrics()
    watch: list[tuple[int, str, Tensor]] = []

    for batch, at_end in epochs(train_loader, device):
        samples = len(batch[0])
        step += 1
        with autocast:
            output = step_function(model, batch)
        loss = output["loss"]
        loss.backward()
        watch.append((step, "loss", loss.detach().clone()))
        metrics.add(output, samples)
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        clip_grads_with_norm_(parameters, GRADIENT_CLIP_VAL, norm)
        watch.append((step, "gradient norm", norm))

        optimizer.step()
        optimizer.zero_grad()
        if at_end:
            epoch += 1
        stop = "max_epochs" if epoch >= MAX_EPOCHS else None

        if stop is not None or step % LOG_EVERY_N_STEPS == 0:
            for at, what, scalar in watch:
                if not scalar.isfinite():
                    raise FloatingPointError(f"The {what} became NaN or infinite at step {at}.")
            watch.clear()
            report(run_dir, step, epoch, {f"train/{name}": value for name, value in metrics.read().items()})
        if stop is not None or at_end:
            report(run_dir, step, epoch, evaluate(model, step_function, val_loader, device, autocast))
        if stop is not None:
            break


random.seed(0)
np.random.seed(0)
torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
train_loader = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_size=64, shuffle=True)
val_loader = DataLoader(TensorDataset(x[1500:], y[1500:]), batch_size=256)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


def step(model, batch):
    x, y = batch
    logits = model(x)
    return {"loss": F.cross_entropy(logits, y), "accuracy": (logits.argmax(-1) == y).float().mean()}


fit(model, step, train_loader, val_loader, optimizer)
