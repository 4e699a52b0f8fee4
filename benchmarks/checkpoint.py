"""How long a step is held by a save: Sheer, torch.save, PyTorch's distributed checkpoint and Lightning, of the same state, in one run.

    python benchmarks/checkpoint.py                      # 0.1 and 1 GB on the CPU, about five minutes
    python benchmarks/checkpoint.py --device cuda --sizes 1 10
    python benchmarks/checkpoint.py --folder /mnt/disk   # what is written there is deleted

The state is a model and its AdamW, a third each for weights and the two averages. Each way is a process of its own: some steps, with a
save after every fifth; between two saves the steps take at least twice what a synchronous save took, so that none waits for the one
before. What is printed is the time from the end of a step that saves to the start of the next (milliseconds): the first save, then the
median of the others; and the time from the start of the run to the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SAVES = int(os.environ.get("SAVES", "6"))
EVERY = 5


class Blocks(nn.Module):
    """Many matrices, of which each step uses a corner: a step is short, whatever the size."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        side = 1024
        self.blocks = nn.ParameterList(
            [nn.Parameter(torch.randn(side, side)) for _ in range(max(1, numbers // side**2))]
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * sum(block[:1, :4].sum() for block in self.blocks)


def step(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().mean()


class Held:
    """Notes when steps end and begin, and lets those between two saves take long enough."""

    def __init__(self, pause: float) -> None:
        self.pause, self.began, self.ended = pause, time.perf_counter(), 0.0
        self.times: list[float] = []
        self.first_step = 0.0
        self.step = 0

    def end(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended = time.perf_counter()

    def start(self) -> None:
        now = time.perf_counter()
        if self.step == 0:
            self.first_step = now - self.began
        elif self.step % EVERY == 0:
            self.times.append((now - self.ended) * 1e3)
        self.step += 1
        time.sleep(self.pause / EVERY)

    def found(self) -> dict[str, float]:
        return {"first": self.times[0], "others": statistics.median(self.times[1:]), "start": self.first_step}


def model_and_batch(size: float, device: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return Blocks(int(size * 1e9 / 12)).to(device), [torch.ones(2, 4, device=device)]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6)


def sheer_saves(size: float, device: str, folder: Path, held: Held, asynchronous: bool) -> None:
    import sheer

    model, batch = model_and_batch(size, device)

    class Clock:
        def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
            held.start()

        def on_step_end(self, step: int, model: nn.Module) -> None:
            held.end()

    sheer.Trainer(
        max_steps=(SAVES + 1) * EVERY - 1,
        device=device,
        checkpoint=sheer.Checkpoint(every_n_steps=EVERY, asynchronous=asynchronous),
        run_dir=folder / "run",
        callbacks=[Clock()],
        loggers=[sheer.Console(live=False)],
    ).fit(model, step, [batch], optimizer=adamw)


def by_hand(size: float, device: str, folder: Path, held: Held, save: Callable[[dict[str, Any], int], Any]) -> None:
    model, batch = model_and_batch(size, device)
    optimizer = adamw(model)
    for number in range(1, (SAVES + 1) * EVERY):
        held.start()
        step(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        held.end()
        if number % EVERY == 0:
            save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, number)


def torch_save(size: float, device: str, folder: Path, held: Held) -> None:
    def save(state: dict[str, Any], number: int) -> None:
        with (folder / f"{number}.pt").open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())

    by_hand(size, device, folder, held, save)


def dcp(size: float, device: str, folder: Path, held: Held, asynchronous: bool) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    kind = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    waiting: list[Any] = []

    def save(state: dict[str, Any], number: int) -> None:
        if not asynchronous:
            dcp.save(state, checkpoint_id=folder / str(number))
            return
        for future in waiting:
            future.result()
        waiting[:] = [dcp.async_save(state, checkpoint_id=folder / str(number))]

    by_hand(size, device, folder, held, save)
    for future in waiting:
        future.result()
    dist.destroy_process_group()


def lightning_saves(size: float, device: str, folder: Path, held: Held, asynchronous: bool) -> None:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    model, batch = model_and_batch(size, device)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return step(self.model, batch)

        def configure_optimizers(self) -> Any:
            return adamw(self.model)

    class Clock(L.Callback):  # called before ModelCheckpoint, which Lightning puts last
        def on_train_batch_start(self, *args: Any) -> None:
            held.start()

        def on_train_batch_end(self, *args: Any) -> None:
            held.end()

    class Endless:
        def __iter__(self) -> Any:
            while True:
                yield batch

    L.Trainer(
        max_steps=(SAVES + 1) * EVERY - 1,
        accelerator="gpu" if device == "cuda" else "cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock(), ModelCheckpoint(folder, every_n_train_steps=EVERY)],
        plugins=[AsyncCheckpointIO()] if asynchronous else [],
        default_root_dir=folder,
    ).fit(Module(), Endless())


WAYS: dict[str, Callable[[float, str, Path, Held], None]] = {
    "Sheer, synchronous": lambda *a: sheer_saves(*a, asynchronous=False),
    "Sheer, beside training": lambda *a: sheer_saves(*a, asynchronous=True),
    "torch.save and fsync": torch_save,
    "DCP, save": lambda *a: dcp(*a, asynchronous=False),
    "DCP, async_save": lambda *a: dcp(*a, asynchronous=True),
    "Lightning": lambda *a: lightning_saves(*a, asynchronous=False),
    "Lightning, AsyncCheckpointIO": lambda *a: lightning_saves(*a, asynchronous=True),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.1, 1.0], help="of the state, in GB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--saves", type=int, default=SAVES)
    parser.add_argument(
        "--pause", type=float, default=3.0, help="between two saves, in seconds for each GB of the state"
    )
    parser.add_argument("--one", nargs=3, metavar=("WAY", "SIZE", "PAUSE"))
    args = parser.parse_args()
    if args.one:
        way, size, pause = args.one
        warnings.simplefilter("ignore")
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        held = Held(float(pause))
        try:
            WAYS[way](float(size), args.device, folder, held)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print("FOUND " + json.dumps(held.found()))
        return
    print(f"{args.device}, torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
    for size in args.sizes:
        print(
            f"\n| {size:g} GB | first save, ms | others, ms | to the first step, s |\n| --- | --- | --- | --- |",
            flush=True,
        )
        for way in args.ways:
            pause = args.pause * size + 0.5
            command = [sys.executable, __file__, "--device", args.device, "--folder", str(args.folder)]
            done = subprocess.run(
                [*command, "--one", way, str(size), str(pause)],
                capture_output=True,
                text=True,
                env={**os.environ, "SAVES": str(args.saves)},
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
            if not lines:
                print(
                    f"| {way} | failed: {(done.stderr.strip().splitlines() or ['no output'])[-1][:200]} |", flush=True
                )
                continue
            found = json.loads(lines[-1][6:])
            print(f"| {way} | {found['first']:.1f} | {found['others']:.1f} | {found['start']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
