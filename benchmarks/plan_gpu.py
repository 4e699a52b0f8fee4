"""How far `sheer plan` is from the memory that a GPT of 124M parameters takes on GPUs, as a markdown table.

python benchmarks/plan_gpu.py                                         # on one GPU
torchrun --nproc-per-node 2 benchmarks/plan_gpu.py                    # on two
torchrun --nproc-per-node 2 benchmarks/plan_gpu.py --small            # a try on the CPU, where no peak is measured

Planned is what the plan says for the rank without touching the GPU, in a process of its own; measured are the storages of parameters,
gradients and optimizer state, and torch.cuda.max_memory_allocated over steps 3 to 5. The rank that is farthest from its plan is shown.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

import sheer
from sheer.console import silent_console
from sheer.distributed.world import world

WAYS: dict[str, dict[str, Any]] = {
    "32-true": {"batch_size": 8},
    "bf16-mixed": {"batch_size": 16, "precision": "bf16-mixed"},
    "bf16-mixed, micro-batches": {"batch_size": 16, "precision": "bf16-mixed", "micro_batch_size": 4},
    "bf16-true, fused AdamW": {"batch_size": 16, "precision": "bf16-true", "fused": True},
    "bf16-mixed, checkpointed blocks": {"batch_size": 16, "precision": "bf16-mixed", "recompute": True},
}
WAYS_ON_RANKS: dict[str, dict[str, Any]] = {
    "DDP": {"batch_size": 16, "precision": "bf16-mixed", "parallel": "ddp"},
    "FSDP2": {"batch_size": 16, "precision": "bf16-mixed", "parallel": "fsdp"},
    "FSDP2, 32-true, micro-batches": {"batch_size": 16, "parallel": "fsdp", "micro_batch_size": 4},
}
ROWS = ("parameters", "gradients", "optimizer state", "most in a step")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, width]
        parts = self.qkv(self.before_attention(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, time: int, recompute: bool) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight, self.recompute = self.words.weight, recompute

    def forward(self, codes: Tensor) -> Tensor:
        x = self.words(codes) + self.positions(torch.arange(codes.shape[1], device=codes.device))
        for block in self.blocks:
            if self.recompute:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(self.norm(x))


class Windows(Dataset[Tensor]):
    def __init__(self, vocabulary: int, time: int) -> None:
        self.vocabulary, self.time = vocabulary, time

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(index, index + self.time + 1) % self.vocabulary


def step(model: nn.Module, codes: Tensor) -> Tensor:
    return F.cross_entropy(model(codes[:, :-1]).flatten(0, 1), codes[:, 1:].flatten())


class Measure:
    """A callback: what steps 3 to 5 hold, and the most that they take."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: Any) -> None:
        self.optimizer = optimizers["optimizer"]

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        if step == 3 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_gradients(self, step: int, model: nn.Module) -> None:
        from sheer.plan.ledger import storage_bytes

        self.found["gradients"] = storage_bytes(parameter.grad for parameter in model.parameters())

    def on_step_end(self, step: int, model: nn.Module) -> None:
        from sheer.plan.ledger import state_tensors, storage_bytes

        if step == 5:
            if torch.cuda.is_available():
                self.found["most in a step"] = torch.cuda.max_memory_allocated()
            self.found["parameters"] = storage_bytes(model.parameters())
            self.found["optimizer state"] = storage_bytes(state_tensors(self.optimizer))


def train(way: str, small: bool) -> dict[str, int]:
    """Make five steps; returns bytes by the names of ROWS."""
    options = {**WAYS, **WAYS_ON_RANKS}[way]
    vocabulary, width, layers, time = (515, 64, 2, 32) if small else (50_304, 768, 12, 1024)
    sheer.seed_everything(0)
    model = GPT(vocabulary, width, layers, time, options.get("recompute", False))
    measure = Measure()
    trainer = sheer.Trainer(
        max_steps=5,
        gradient_clip_val=1.0,
        checkpoint=False,
        callbacks=[measure],
        loggers=[silent_console()],
        run_dir=Path(tempfile.mkdtemp()) / "run",
        **{name: options[name] for name in ("precision", "parallel", "micro_batch_size") if name in options},
    )
    loader = DataLoader(Windows(vocabulary, time), batch_size=options["batch_size"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=options.get("fused"))
    trainer.fit(model, step, loader, optimizer=optimizer)
    return measure.found


def planned(way: str, small: bool) -> dict[str, int]:
    """Plan the same training for this rank, in a process that is no rank and sees no GPU; returns bytes by the names of ROWS."""
    place = world()
    program = (
        "import json, pathlib, sys; from sheer.plan.estimate import estimate_script as e; f = e(pathlib.Path(sys.argv[1]), sys.argv[4:], {}, "
        "int(sys.argv[2]), int(sys.argv[3])); print('PLAN' + json.dumps([f.held.parameters, f.held.gradients, f.held.optimizer, f.peak]))"
    )
    unset = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    )
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    root = str(Path(__file__).resolve().parents[1])
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", program, __file__, str(place.world_size), str(place.rank), "--train", way]
    command += ["--small"] if small else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The plan of {way} failed:\n{done.stderr}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("PLAN"))
    return dict(zip(ROWS, json.loads(line.removeprefix("PLAN")), strict=True))


def compared(way: str, small: bool) -> list[str]:
    """Return the rows of a way, of the rank whose peak is farthest from its plan."""
    from sheer.distributed.agree import gathered

    plan, found = planned(way, small), train(way, small)
    pairs = [(plan, found)] if world().world_size == 1 else gathered((plan, found))
    plan, found = max(pairs, key=farthest)
    lines = []
    for name in ROWS:
        if name in found:
            error = f"{plan[name] / found[name] - 1:+.2%}"
            lines.append(f"| {way} | {name} | {plan[name] / 2**20:,.1f} | {found[name] / 2**20:,.1f} | {error} |")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return lines


def farthest(pair: tuple[dict[str, int], dict[str, int]]) -> float:
    """Return how far the measured peak is from the planned one."""
    plan, found = pair
    return abs(found.get("most in a step", plan["most in a step"]) - plan["most in a step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--train", metavar="WAY", help="only train, one way")
    given = parser.parse_args()
    if given.train:
        train(given.train, given.small)
        return
    ranks = world().world_size
    if world().rank == 0:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{ranks} x {device}, torch {torch.__version__}, MiB\n", flush=True)
        print("| way | what | planned | measured | error |\n| --- | --- | --- | --- | --- |", flush=True)
    for way in WAYS if ranks == 1 else WAYS_ON_RANKS:
        try:
            lines = compared(way, given.small)
        except torch.OutOfMemoryError as error:
            lines = [f"| {way} | out of memory: {str(error).splitlines()[0]} | | | |"]
            if ranks > 1:
                raise
        if world().rank == 0:
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
