"""What a step costs on a GPU: hand-written loops, Sheer, Lightning, the HF Trainer and Accelerate, each in a process of its own, in one run.

    python benchmarks/gpu.py                                    # all, about half an hour
    python benchmarks/gpu.py --workloads MLP "CNN 1M" --ways hand sheer
    python benchmarks/gpu.py --out table.json

All train the same model on the same batches, which lie on the GPU, with the same fused AdamW and clipping at 1.0. A step is the median
of five equal parts of the measured steps, with the device waited for only at their ends. `peak` is the memory allocated at most
(MiB); `start` is the time from the call that trains to the end of the first step, `end` that from the end of the last step to the
return of that call (seconds). MFU is over 989 TFLOP/s.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch._functorch.config
from gpu_workloads import WORKLOADS, Workload, step
from torch import Tensor, nn

PEAK = 989e12  # operations a second of an H100 or H200 in bf16, by its data sheet
PARTS = 5
Batches = list[tuple[Tensor, Tensor]]


class Clock:
    """Is told of the end of each step, and waits for the device at a few."""

    def __init__(self, workload: Workload) -> None:
        self.warm, measured = workload.steps
        self.part = measured // PARTS
        self.last = self.warm + self.part * PARTS
        self.step, self.times = 0, list[float]()
        self.began = time.perf_counter()
        self.first = 0.0

    def tick(self) -> None:
        self.step += 1
        if self.step == 1 or (self.step >= self.warm and (self.step - self.warm) % self.part == 0):
            torch.cuda.synchronize()
            now = time.perf_counter()
            if self.step == 1:
                self.first = now - self.began
            else:
                self.times.append(now)

    def found(self) -> dict[str, float]:
        parts = [(b - a) / self.part * 1e3 for a, b in zip(self.times, self.times[1:], strict=False)]
        return {
            "ms": statistics.median(parts),
            "spread": max(parts) - min(parts),
            "peak": torch.cuda.max_memory_allocated() / 2**20,
            "start": self.first,
            "end": time.perf_counter() - self.times[-1],
        }


def adamw(model: nn.Module, fused: bool | None = True, **how: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused, **how)


def autocast(workload: Workload) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if workload.precision == "bf16" else contextlib.nullcontext()


def by_hand(
    workload: Workload,
    model: nn.Module,
    batches: Batches,
    clock: Clock,
    compiled: Any,
    captured: bool,
    update_too: bool = False,
    budget: float = 1.0,
) -> None:
    """The loop of an expert: eager or compiled (with clipping and the optimizer, or a budget for activations), replayed as one CUDA graph or not."""
    torch._functorch.config.activation_memory_budget = budget
    # A compiled update is fused by the compiler.
    optimizer = adamw(model, fused=None if update_too else True, capturable=captured or update_too)
    run_step: Callable[..., Tensor] = (
        torch.compile(step, mode=compiled if isinstance(compiled, str) else None) if compiled else step
    )

    def clip_and_update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    finish = torch.compile(clip_and_update) if update_too else clip_and_update

    def update(batch: tuple[Tensor, Tensor]) -> Tensor:
        with autocast(workload):
            loss = run_step(model, batch)
        loss.backward()
        finish()
        optimizer.zero_grad()
        return loss.detach()

    graph, losses, held = None, [], [part.clone() for part in batches[0]]
    while clock.step < clock.last:
        batch = batches[clock.step % len(batches)]
        if captured and clock.step == 3:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                static = update((held[0], held[1]))
        if graph is not None:
            torch._foreach_copy_(held, list(batch))
            graph.replay()
            losses.append(static.clone())
        else:
            losses.append(update(batch))
        clock.tick()


def sheer_fit(
    workload: Workload, model: nn.Module, batches: Batches, clock: Clock, budget: float | None = None, **how: Any
) -> None:
    import sheer

    if budget is not None:
        how["compile"] = sheer.Compile(activation_memory_budget=budget)
    sheer.Trainer(
        max_steps=clock.last,
        gradient_clip_val=1.0,
        checkpoint=False,
        run_dir=tempfile.mkdtemp() + "/run",
        loggers=[sheer.Console(live=False)],
        callbacks=[sheer.On(step_end=lambda number, model: clock.tick())],
        **{"precision": "bf16-mixed" if workload.precision == "bf16" else "32-true", **how},
    ).fit(model, step, batches, optimizer=adamw)


class Endless:
    """Batches again and again; Lightning takes a list for several loaders."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.cycle(self.batches)


def lightning_fit(workload: Workload, model: nn.Module, batches: Batches, clock: Clock, compiled: bool) -> None:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.compile(model) if compiled else model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return step(self.model, batch)

        def configure_optimizers(self) -> Any:  # it refuses to clip with a fused optimizer under AMP
            fused = workload.precision != "bf16"
            return torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused)

    class Ticks(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            clock.tick()

    L.Trainer(
        max_steps=clock.last,
        precision="bf16-mixed" if workload.precision == "bf16" else "32-true",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Ticks()],
        default_root_dir=tempfile.mkdtemp(),
    ).fit(Module(), Endless(batches))


def hf_fit(workload: Workload, model: nn.Module, batches: Batches, clock: Clock, compiled: bool) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Ticks(TrainerCallback):
        def on_step_end(self, *args: Any, **more: Any) -> None:
            clock.tick()

    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            return batches * (clock.last // len(batches) + 1)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **more: Any) -> Tensor:
            return step(model, inputs)

        def _prepare_inputs(self, inputs: Any) -> Any:
            return inputs

        def floating_point_ops(self, inputs: Any) -> int:
            return 0

    Own(
        model,
        TrainingArguments(
            tempfile.mkdtemp(),
            max_steps=clock.last,
            bf16=workload.precision == "bf16",
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            torch_compile=compiled,
        ),
        callbacks=[Ticks()],
        train_dataset=[0] * 10_000,
    ).train()


def accelerate_fit(workload: Workload, model: nn.Module, batches: Batches, clock: Clock, compiled: bool) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16" if workload.precision == "bf16" else "no")
    model, optimizer = accelerator.prepare(torch.compile(model) if compiled else model, adamw(model))
    while clock.step < clock.last:
        with accelerator.autocast():
            loss = step(model, batches[clock.step % len(batches)])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()


WAYS: dict[str, Callable[[Workload, nn.Module, Batches, Clock], None]] = {
    "hand": lambda *a: by_hand(*a, compiled=False, captured=False),
    "hand, compiled": lambda *a: by_hand(*a, compiled=True, captured=False),
    "hand, reduce-overhead": lambda *a: by_hand(*a, compiled="reduce-overhead", captured=False),
    "hand, captured": lambda *a: by_hand(*a, compiled=False, captured=True),
    "hand, compiled and captured": lambda *a: by_hand(*a, compiled=True, captured=True),
    "hand, compiled with the update": lambda *a: by_hand(*a, compiled=True, captured=False, update_too=True),
    "hand, compiled with the update and captured": lambda *a: by_hand(
        *a, compiled=True, captured=True, update_too=True
    ),
    "hand, compiled, budget 0.9": lambda *a: by_hand(*a, compiled=True, captured=False, budget=0.9),
    "sheer": lambda *a: sheer_fit(*a),
    "sheer, compile": lambda *a: sheer_fit(*a, compile=True),
    "sheer, compile, budget 0.9": lambda *a: sheer_fit(*a, budget=0.9),
    "sheer, cuda_graph": lambda *a: sheer_fit(*a, cuda_graph=True),
    "sheer, compile and cuda_graph": lambda *a: sheer_fit(*a, compile=True, cuda_graph=True),
    "sheer, compile and float8": lambda *a: sheer_fit(*a, compile=True, precision="float8-mixed"),
    "sheer, compile, cuda_graph and float8": lambda *a: sheer_fit(
        *a, compile=True, cuda_graph=True, precision="float8-mixed"
    ),
    "Lightning": lambda *a: lightning_fit(*a, compiled=False),
    "Lightning, compiled": lambda *a: lightning_fit(*a, compiled=True),
    "HF Trainer": lambda *a: hf_fit(*a, compiled=False),
    "HF Trainer, compiled": lambda *a: hf_fit(*a, compiled=True),
    "Accelerate": lambda *a: accelerate_fit(*a, compiled=False),
    "Accelerate, compiled": lambda *a: accelerate_fit(*a, compiled=True),
}


def one(name: str, way: str) -> None:
    """Measure one way in this process, and print what was found as JSON."""
    warnings.simplefilter("ignore")
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    model = workload.build().cuda()
    batches = [tuple(part.cuda() for part in workload.batch()) for _ in range(8)]
    torch.cuda.synchronize()
    clock = Clock(workload)
    WAYS[way](workload, model, batches, clock)
    torch.cuda.synchronize()
    print("FOUND " + json.dumps(clock.found()))


def peers() -> str:
    """Return the versions of the peers; not each machine with a GPU has them all."""
    there = [name for name in ("lightning", "transformers", "accelerate") if importlib.util.find_spec(name)]
    return ", ".join(f"{name} {metadata.version(name)}" for name in there)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2)
    args = parser.parse_args()
    if args.one:
        one(*args.one)
        return
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}; {peers()}"
    )
    table: dict[str, dict[str, Any]] = {}
    for name in args.workloads:
        print(
            f"\n| {name} | ms a step | ± | peak MiB | start s | end s | MFU |\n| --- | --- | --- | --- | --- | --- | --- |",
            flush=True,
        )
        for way in args.ways:
            command = [sys.executable, __file__, "--one", name, way]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
            if not lines:
                print(
                    f"| {way} | failed: {(done.stderr.strip().splitlines() or ['no output'])[-1][:200]} |", flush=True
                )
                continue
            found = json.loads(lines[-1][6:])
            table.setdefault(name, {})[way] = found
            mfu = WORKLOADS[name].flops / (found["ms"] / 1e3) / PEAK
            print(
                f"| {way} | {found['ms']:.3f} | {found['spread']:.3f} | {found['peak']:.0f} | {found['start']:.1f} | {found['end']:.2f} | "
                f"{f'{mfu:.2f}' if mfu else ''} |",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
