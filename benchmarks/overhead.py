"""What a step costs beyond PyTorch itself: a hand-written loop, Sheer, Lightning, Accelerate and the HF Trainer, in one run.

    python benchmarks/overhead.py            # about five minutes on two cores
    python benchmarks/overhead.py --blocks 100

All train the same small network on the same data with the same fused optimizer. Each is measured beside the hand-written loop that does
the same, in a process of their own: CPython fits a function's bytecode to what it has seen, and two ways to use one framework would share
its functions. Both run in threads that take turns in blocks of ten steps, in random order, so that whatever the machine does meets both.
Five steps before each block are not timed: the other's turn has left the caches cold, which no training meets. What is compared is the
lower quartile of the blocks, once from the even blocks and once from the odd ones: where the two halves differ by more than 10 µs, only the
calls count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

BLOCK = 10
WARM_UP = 5
TURN = WARM_UP + BLOCK
LOG_EVERY = 50
Tick = Callable[[], None]


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(32_000, 16, generator=generator), torch.randint(0, 4, (32_000,), generator=generator)
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)


# --- the arms; each calls `tick` at the start of every step ------------------------------------------------------------------


def hand_written(tick: Tick, steps: int) -> None:
    """The bare loop."""
    net = network()
    optimizer = adamw(net)
    for _ in range(1000):
        for x, y in DataLoader(data(), batch_size=32, shuffle=True):
            tick()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def hand_written_defaults(tick: Tick, steps: int) -> None:
    """The loop with what Sheer does by default: a weighted mean of the loss, a test for NaN, and a line, every 50 steps."""
    net = network()
    optimizer = adamw(net)
    losses: list[torch.Tensor] = []
    samples: list[int] = []
    step = 0
    log = Path(tempfile.mkdtemp(), "metrics.jsonl").open("w")
    for epoch in range(1000):
        for x, y in DataLoader(data(), batch_size=32, shuffle=True):
            tick()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            losses.append(loss.detach())
            samples.append(len(x))
            if step % LOG_EVERY == 0:
                values = torch.stack(losses).double()
                if not torch.isfinite(values).all():
                    raise FloatingPointError
                mean = (values * torch.tensor(samples)).sum().item() / sum(samples)
                log.write(json.dumps({"step": step, "epoch": epoch, "loss": mean}) + "\n")
                log.flush()
                losses.clear()
                samples.clear()


def hand_written_everything(tick: Tick, steps: int) -> None:
    """The loop with autocast, clipping, a schedule, EMA, a transfer, a bar, a log and checkpoints."""
    from rich.progress import Progress
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    net = network()
    optimizer = adamw(net)
    scheduler = one_cycle(optimizer, steps)
    average = get_ema_multi_avg_fn(0.999)  # on lists: a hundred Python calls fewer than AveragedModel makes
    averages = [parameter.detach().clone() for parameter in net.parameters()]
    device = torch.device("cpu")
    losses: list[torch.Tensor] = []
    samples: list[int] = []
    step = 0
    folder = Path(tempfile.mkdtemp())
    log = (folder / "metrics.jsonl").open("w")
    parameters = list(net.parameters())
    with Progress(disable=True) as bar:
        task = bar.add_task("training", total=steps)
        for epoch in range(1000):
            for x, y in DataLoader(data(), batch_size=32, shuffle=True):
                tick()
                x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(net(x), y)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                average(averages, parameters, step)
                step += 1
                losses.append(loss.detach())
                samples.append(len(x))
                if step % LOG_EVERY == 0:
                    values = torch.stack(losses).double()
                    if not torch.isfinite(values).all() or not torch.isfinite(norm):
                        raise FloatingPointError
                    mean = (values * torch.tensor(samples)).sum().item() / sum(samples)
                    rate = scheduler.get_last_lr()[0]
                    log.write(json.dumps({"step": step, "epoch": epoch, "loss": mean, "lr": rate}) + "\n")
                    log.flush()
                    bar.update(task, completed=step)
                    losses.clear()
                    samples.clear()
                if step % 2000 == 0:
                    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, folder / "last.pt")


def sheer_step(tick: Tick) -> Any:
    def step(net: nn.Module, batch: Any) -> torch.Tensor:
        tick()
        x, y = batch
        return F.cross_entropy(net(x), y)

    return step


def sheer_defaults(tick: Tick, steps: int) -> None:
    import sheer

    net = network()
    trainer = sheer.Trainer(max_steps=steps, run_dir=tempfile.mkdtemp(), loggers=[quiet_console()])
    trainer.fit(net, sheer_step(tick), DataLoader(data(), batch_size=32, shuffle=True), optimizer=adamw(net))


def sheer_everything(tick: Tick, steps: int) -> None:
    import sheer

    net = network()
    trainer = sheer.Trainer(
        max_steps=steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        callbacks=[sheer.EMA(0.999), sheer.LearningRateMonitor()],
        checkpoint=sheer.Checkpoint(every_n_steps=2000),
        loggers=[quiet_console(live=True)],
        run_dir=tempfile.mkdtemp(),
    )
    loader = DataLoader(data(), batch_size=32, shuffle=True)
    trainer.fit(net, sheer_step(tick), loader, optimizer=adamw(net), scheduler=one_cycle)


def quiet_console(live: bool = False) -> Any:
    import sheer

    return sheer.Console(live=live, file=Path(os.devnull).open("w"))


def lightning_module(tick: Tick, logs: bool) -> Any:
    import lightning as lit

    class Module(lit.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            tick()
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            if logs:
                self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return adamw(self.net)

    return Module()


def lightning_trainer(tick: Tick, steps: int, logs: bool) -> None:
    import lightning as lit

    trainer = lit.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=lit.pytorch.loggers.CSVLogger(tempfile.mkdtemp()) if logs else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=LOG_EVERY,
    )
    trainer.fit(lightning_module(tick, logs), DataLoader(data(), batch_size=32, shuffle=True))


def lightning_bare(tick: Tick, steps: int) -> None:
    lightning_trainer(tick, steps, logs=False)


def lightning_logging(tick: Tick, steps: int) -> None:
    lightning_trainer(tick, steps, logs=True)


def accelerate_loop(tick: Tick, steps: int) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = network()
    net, optimizer, loader = accelerator.prepare(net, adamw(net), DataLoader(data(), batch_size=32, shuffle=True))
    for _ in range(1000):
        for x, y in loader:
            tick()
            loss = F.cross_entropy(net(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def hf_trainer(tick: Tick, steps: int) -> None:
    from transformers import Trainer, TrainingArguments

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            tick()
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    rows = [{"x": x, "labels": y} for x, y in data()]
    net = Wrapped()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=32,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        log_level="error",
    )
    from transformers.trainer_callback import PrinterCallback

    trainer = Trainer(net, arguments, train_dataset=rows, optimizers=(adamw(net), None))
    trainer.remove_callback(PrinterCallback)
    trainer.train()


ARMS: dict[str, Callable[[Tick, int], None]] = {
    "hand-written, bare": hand_written,
    "hand-written, as Sheer by default": hand_written_defaults,
    "Sheer, defaults": sheer_defaults,
    "hand-written, everything on": hand_written_everything,
    "Sheer, everything on": sheer_everything,
    "Accelerate loop": accelerate_loop,
    "Lightning Trainer, nothing logged": lightning_bare,
    "Lightning Trainer, one self.log": lightning_logging,
    "HF Trainer": hf_trainer,
}
# Each framework's arm, and the loop that does the same.
BASES = {
    "Sheer, defaults": "hand-written, as Sheer by default",
    "Sheer, everything on": "hand-written, everything on",
    "Accelerate loop": "hand-written, bare",
    "Lightning Trainer, nothing logged": "hand-written, bare",
    "Lightning Trainer, one self.log": "hand-written, bare",
    "HF Trainer": "hand-written, bare",
}


class Arm(threading.Thread):
    """An arm in a thread of its own, which goes on for a block of steps whenever it is told to."""

    def __init__(self, name: str, train: Callable[[Tick, int], None], steps: int) -> None:
        super().__init__(name=name, daemon=True)
        self.train, self.steps = train, steps
        self.go, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.step, self.began = 0, 0
        self.times: list[float] = []
        self.calls = 0
        self.counting = False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.go.acquire()
            self.train(self.tick, self.steps)
        except BaseException as error:
            self.error = error
        self.paused.release()

    def tick(self) -> None:
        self.step += 1
        place = self.step % TURN
        if place == 0:
            self.times.append((time.perf_counter_ns() - self.began) / BLOCK / 1000)
            sys.setprofile(None)
            self.paused.release()
            self.go.acquire()
            if self.counting:
                sys.setprofile(self.count)
        elif place == WARM_UP:
            self.began = time.perf_counter_ns()

    def count(self, frame: Any, event: str, argument: Any) -> None:
        self.calls += event == "call"

    def block(self) -> None:
        """Let it make a block of steps."""
        self.go.release()
        self.paused.acquire()
        if self.error is not None:
            raise self.error


def measured(names: tuple[str, ...], blocks: int) -> list[Arm]:
    """Run some arms in turn, and count the calls of each afterwards."""
    arms = [Arm(name, ARMS[name], (blocks + 50) * TURN) for name in names]
    for arm in arms:
        arm.start()
        for _ in range(10):
            arm.block()
        arm.times.clear()
    for _ in range(blocks):
        for arm in random.sample(arms, len(arms)):
            arm.block()
    for arm in arms:
        arm.counting = True
        for _ in range(10):
            arm.block()
        arm.counting = False
    return arms


def quartile(times: list[float]) -> float:
    return statistics.quantiles(times, n=4)[0]


def print_step(name: str, blocks: int) -> None:
    """Print what a step of an arm costs over the loop that does the same."""
    base, arm = measured((BASES[name], name), blocks)
    times, base_times = arm.times[:blocks], base.times[:blocks]
    halves = [quartile(times[half::2]) - quartile(base_times[half::2]) for half in (0, 1)]
    more = quartile(times) - quartile(base_times)
    calls, base_calls = arm.calls / (10 * TURN), base.calls / (10 * TURN)
    cells = f"{name} | {quartile(times):.0f} | {quartile(base_times):.0f} | {more:+.0f} ({halves[0]:+.0f}, {halves[1]:+.0f})"
    print(f"| {cells} | {calls:.0f} | {calls - base_calls:+.0f} |", flush=True)


def print_steps(blocks: int) -> None:
    """Print a row for each arm, measured in a process of its own."""
    print(
        f"\n| a step of an MLP 16-32-4, batch 32 ({blocks} blocks of {BLOCK}) | µs | by hand | more (even, odd blocks) | Python calls | more |"
    )
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in BASES:
        subprocess.run([sys.executable, __file__, "--blocks", str(blocks), "--arm", name], check=True)


IMPORTS = {
    "torch alone": "torch",
    "Sheer": "sheer",
    "Accelerate": "accelerate",
    "Lightning": "lightning",
    "HF Trainer": "transformers.trainer",
}
FIRST_STEP = {
    "torch alone": "hand_written",
    "Sheer": "sheer_defaults",
    "Accelerate": "accelerate_loop",
    "Lightning": "lightning_bare",
    "HF Trainer": "hf_trainer",
}
CHILD = """
import os, sys, time
sys.path.insert(0, {folder!r})
import overhead
steps = 0
def tick():
    global steps
    steps += 1
    if steps == 1:
        first = time.time() - float(sys.argv[1])
        print("FIRST", first, flush=True)
    if steps == 200:
        status = open("/proc/self/status").read()  # VmHWM starts anew with the program, ru_maxrss does not
        print("MEMORY", int(status.split("VmHWM:")[1].split()[0]) / 1024, flush=True)
        os._exit(0)
overhead.{function}(tick, 1000)
"""


def print_starts(repeats: int = 5) -> None:
    """Print import time, time from launch to the first step, and peak memory, the least of several starts; the first also compiles."""
    print("\n| | import, s over torch | launch to first step, s | peak memory, MiB |\n| --- | --- | --- | --- |")
    folder = str(Path(__file__).parent)
    imports: dict[str, list[float]] = {name: [] for name in IMPORTS}
    firsts: dict[str, list[float]] = {name: [] for name in IMPORTS}
    memory: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(repeats):
        for name, module in IMPORTS.items():
            code = f"import torch, time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
            imports[name].append(float(output(code).split()[-1]))
            words = output(CHILD.format(folder=folder, function=FIRST_STEP[name]), str(time.time())).split()
            firsts[name].append(float(words[words.index("FIRST") + 1]))
            memory[name].append(float(words[words.index("MEMORY") + 1]))
    for name in IMPORTS:
        print(f"| {name} | {min(imports[name]):.2f} | {min(firsts[name]):.1f} | {min(memory[name]):.0f} |")


def output(code: str, *arguments: str) -> str:
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as installed
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=compiled)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=500)
    parser.add_argument("--arm", choices=BASES, help="only this one, without the starts")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.arm is not None:
        print_step(arguments.arm, arguments.blocks)
        os._exit(0)  # the arms are still in the middle of their training
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "accelerate", "transformers")
    )
    print(
        f"{time.strftime('%Y-%m-%d')}; Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, one thread",
        flush=True,
    )
    print_steps(arguments.blocks)
    print_starts()


if __name__ == "__main__":
    main()
