"""Handwritten digits, the short way, on several ranks."""

# From `digits_ddp.py`, by `sheer eject` 0.1.0 (Apache License 2.0); it is yours, to change as you like.
# Run it with: torchrun --nproc-per-node 2 digits_ddp_torch.py
# Settings: max_epochs=5, precision='bf16-mixed', parallel='ddp', gradient_clip_val=1.0, checkpoint=False.

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import atexit
import itertools
import json
import math
import numpy as np
import os
import random
import time
import torch.distributed as dist
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from typing import Any, TypeVar

MAX_EPOCHS = 5  # stop after this many passes over the training data
GRADIENT_CLIP_VAL = 1.0  # clip gradients to this norm, or to this absolute value
LOG_EVERY_N_STEPS = 50  # steps between two log points; the only points where the host waits for the device
RUN_DIR = time.strftime("runs/digits_ddp/%Y-%m-%d_%H-%M-%S")  # the folder of the run


def own_device(device: torch.device) -> torch.device:
    """Return the accelerator that is this rank's own, and make it the current one."""
    if device.type == "cpu":
        return device
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    return torch.device(device.type, int(os.environ["LOCAL_RANK"]))


class StepModule(nn.Module):
    """A module whose forward is a step: what DDP and `fully_shard` go around, so that the step gets the very model that was passed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, step_function: Callable[..., Any], batch: Any, *number: int) -> Any:
        """Run a step function on the model."""
        return step_function(self.model, batch, *number)


T = TypeVar("T")


def from_rank_zero(value: T) -> T:
    """Return what rank 0 has for a value. All ranks must call it."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def mix_seed(*numbers: int) -> int:
    """Make one seed of 63 bits from several whole numbers, so that neighbours have nothing in common."""
    state = 0
    for number in numbers:
        state = state + number + 11400714819323198485 & 18446744073709551615
        state = (state ^ state >> 30) * 13787848793156543929 & 18446744073709551615
        state = (state ^ state >> 27) * 10723151780598845931 & 18446744073709551615
        state ^= state >> 31
    return state >> 1


def differ_in_random_numbers(rank: int) -> None:
    """Give ranks that compute on other samples, or other layers, random numbers of their own; tensor ranks draw the same."""
    seed = from_rank_zero(torch.initial_seed())
    if rank > 0:
        seed_2 = mix_seed(seed, rank)
        random.seed(seed_2)
        np.random.seed(seed_2 & 4294967295)
        torch.manual_seed(seed_2)


def folder(run_dir: Path) -> Path:
    """Make the folder of a run; one that is there is refused, unless the run goes on."""
    run_dir.mkdir(parents=True, exist_ok=False)
    return run_dir


class Metrics:
    """Weighted means of what steps return. Adding does not wait for the device; reading does."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[Any, int]]] = {}

    def add(self, output: Any, samples: int) -> None:
        """Add what a step returned for a batch of `samples`."""
        for name, value in output.items():
            kept = value.detach().clone() if isinstance(value, Tensor) else value
            self.rows.setdefault(name, []).append((kept, samples))


def share(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """How many of `size` samples stand before this rank's part, and how many are in it; the first ranks get one more."""
    each, more = divmod(size, world_size)
    return rank * each + min(rank, more), each + (rank < more)


def shared_epochs(
    loader: Any, device: torch.device, rank: int, world_size: int
) -> Iterator[tuple[Any, int, int, bool]]:
    """Yield this rank's part of each batch, its samples, those of the whole batch, and whether that ends its epoch."""
    seed = from_rank_zero(torch.initial_seed())
    for epoch in itertools.count():
        mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
        loader.sampler.generator = torch.Generator().manual_seed(mixed)
        batches = list(loader.batch_sampler)
        loader.sampler.generator = None
        shares = [share(len(batch), rank, world_size) for batch in batches]
        own = [batch[start : start + size] or batch[:1] for batch, (start, size) in zip(batches, shares, strict=True)]
        shared = DataLoader(
            loader.dataset, batch_sampler=own, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory
        )
        for number, part in enumerate(shared):
            yield (
                [tensor.to(device, non_blocking=True) for tensor in part],
                shares[number][1],
                len(batches[number]),
                number + 1 == len(batches),
            )


def gathered(value: T) -> list[T]:
    """Return what each rank has for a value, in the order of the ranks. All ranks must call it."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_on_ranks(watched: list[tuple[int, str, Tensor]]) -> None:
    """Raise an error that names the first value since the last check that was NaN or infinite, on any rank."""
    own = [(at, what) for at, what, scalar in watched if not scalar.isfinite()]
    bad = [each for found in gathered(own) for each in found]
    watched.clear()
    if bad:
        raise FloatingPointError(f"The {min(bad)[1]} became NaN or infinite at step {min(bad)[0]}.")


def read_on_ranks(metrics: Metrics) -> dict[str, float]:
    """Return the means over all ranks, and start anew."""
    rows, metrics.rows = metrics.rows, {}
    sums: dict[str, tuple[float, float]] = {}
    for part in gathered(
        {
            name: (sum(float(value) * samples for value, samples in values), sum(samples for _, samples in values))
            for name, values in rows.items()
        }
    ):
        for name, (total, weight) in part.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + total, before[1] + weight
    return {name: total / (weight or math.nan) for name, (total, weight) in sums.items()}


def rank_zero_report(rank: int, run_dir: Path, step: int, epoch: int, metrics: dict[str, float]) -> None:
    """Hand metrics to the loggers and the console, on rank 0."""
    if rank == 0:
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), "epoch": epoch, **metrics}) + "\n")
        print(f"step {step:,}", *(f"{name} {value:.4g}" for name, value in metrics.items()), sep=" · ", flush=True)


def evaluate(
    model: nn.Module,
    step_function: Any,
    loaders: Any,
    device: torch.device,
    autocast: torch.autocast,
    rank: int,
    world_size: int,
) -> dict[str, float]:
    """Return the weighted means of what the step returns, over all batches."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    metrics = Metrics()
    batches = list(loaders.batch_sampler)
    own = batches[rank::world_size]
    dealt_out = DataLoader(
        loaders.dataset,
        batch_sampler=own or batches[:1],
        num_workers=loaders.num_workers,
        collate_fn=loaders.collate_fn,
        pin_memory=loaders.pin_memory,
    )
    for number, batch in enumerate(dealt_out):
        samples = len(own[number]) if own else 0
        batch = [tensor.to(device, non_blocking=True) for tensor in batch]
        with torch.no_grad(), autocast:
            output = step_function(model, batch)
        if samples > 0:
            metrics.add(output, samples)
    means = {"val/" + name: value for name, value in read_on_ranks(metrics).items()}
    for module in training:
        module.training = True
    return means


def fit(model: nn.Module, step_function: Any, train_loader: Any, val_loader: Any, optimizer: Optimizer) -> None:
    """Train the model."""
    dist.init_process_group(timeout=timedelta(seconds=600.0))
    atexit.register(time.sleep, 0.2)  # last at exit: a thread of gloo that lets go of a tensor later aborts the process
    atexit.register(dist.destroy_process_group)
    device = own_device(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    stepper = DistributedDataParallel(
        StepModule(model.to(device)),
        device_ids=None if device.type == "cpu" else [device.index],
        find_unused_parameters=False,
        gradient_as_bucket_view=True,
    )
    differ_in_random_numbers(rank)
    directory = from_rank_zero(Path() if rank > 0 else folder(Path(RUN_DIR)))
    parameters = list(model.parameters())
    step = 0
    epoch = 0
    metrics = Metrics()
    watch: list[tuple[int, str, Tensor]] = []

    for batch, samples, all_samples, at_end in shared_epochs(train_loader, device, rank, world_size):
        step += 1
        total = all_samples / world_size
        with autocast:
            output = stepper(step_function, batch)
            if samples == 0:  # it was run for the other ranks' sake
                output = {"loss": output["loss"] * 0}
        loss = output["loss"]
        if samples != total:
            loss = loss * (samples / total)
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
            check_on_ranks(watch)
            logged = {f"train/{name}": value for name, value in read_on_ranks(metrics).items()}
            rank_zero_report(rank, directory, step, epoch, logged)
        if stop is not None or at_end:
            measured = evaluate(model, step_function, val_loader, device, autocast, rank, world_size)
            rank_zero_report(rank, directory, step, epoch, measured)
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
