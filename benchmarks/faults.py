"""What a kill and a damaged file cost: the digits, trained in Sheer, Lightning and the HF Trainer at the settings that each recommends for going on.

    python benchmarks/faults.py                       # 40 kills and 40 corruptions of each, about half an hour on two cores
    python benchmarks/faults.py --kills 5 --corruptions 5 --ways Sheer

Each run is a process, forked from one that has imported the library. It is killed with SIGKILL at a random instant and started again until
it ends. Counted are, against the run that was never killed: how many ended; how many with the same weights, bit for bit; how many samples
were trained on twice, or never, in the epochs of the steps that count (of a step that was made twice the last time counts). For a
corruption a run is stopped at its half, one bit of one file of its newest checkpoint is flipped, and it is started again: either that
is noticed (an error, or a warning and an older checkpoint), or not, and then the weights are those of such a run without damage, or not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import platform
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

STEPS, BATCH = 120, 64


class Digits(Dataset[dict[str, Any]]):
    """The digits, each with its number."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.x = torch.tensor(digits.data / 16, dtype=torch.float32)[: BATCH * 20]
        self.y = torch.tensor(digits.target)[: BATCH * 20]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "labels": self.y[index], "number": index}


class Net(nn.Module):
    """With dropout, so that random states count."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))

    def forward(self, x: Tensor, labels: Tensor, number: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.layers(x), labels)}


@dataclass(frozen=True)
class Task:
    """What is trained: a net on the digits, for so long, and how often it is saved."""

    steps: int
    save_every: int = 10
    net: Callable[[], nn.Module] = Net
    learning_rate: float = 1e-2
    lightning_last: Any = True  # as a file of its own; "link": not written twice


class Log:
    """Writes down which samples each step trains on, and when it began."""

    def __init__(self, folder: Path) -> None:
        self.stream = (folder / "samples.jsonl").open("a")

    def add(self, step: int, batch: Any) -> None:
        self.stream.write(json.dumps([step, batch["number"].tolist(), time.time()]) + "\n")
        self.stream.flush()


def adamw(net: nn.Module, task: Task) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=task.learning_rate)


def in_sheer(folder: Path, task: Task) -> nn.Module:
    import sheer

    sheer.seed_everything(0)
    net, log = task.net(), Log(folder)

    class Samples:
        def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
            log.add(step, batch[0][0])

    sheer.Trainer(
        max_steps=task.steps,
        device="cpu",
        run_dir=folder / "run",
        resume="auto",
        checkpoint=sheer.Checkpoint(every_n_steps=task.save_every),
        callbacks=[Samples()],
        log_every_n_steps=10,
    ).fit(
        net,
        lambda model, batch: model(**batch)["loss"],
        DataLoader(Digits(), BATCH, shuffle=True),
        optimizer=adamw(net, task),
    )
    return net


def in_lightning(folder: Path, task: Task) -> nn.Module:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    L.seed_everything(0)
    net, log = task.net(), Log(folder)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, index: int) -> Tensor:
            log.add(self.global_step + 1, batch)
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            return adamw(self.net, task)

    saved = folder / "checkpoints"
    saves = ModelCheckpoint(saved, every_n_train_steps=task.save_every, save_last=task.lightning_last)
    L.Trainer(
        max_steps=task.steps,
        accelerator="cpu",
        callbacks=[saves],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(Module(), DataLoader(Digits(), BATCH, shuffle=True), ckpt_path="last")
    return net


def in_transformers(folder: Path, task: Task) -> nn.Module:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    torch.manual_seed(0)
    net, log = task.net(), Log(folder)

    class Own(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **more: Any) -> Tensor:
            log.add(self.state.global_step + 1, inputs)
            return super().training_step(model, inputs, *args, **more)

    (folder / "checkpoints").mkdir(exist_ok=True)
    trainer = Own(
        net,
        TrainingArguments(
            str(folder / "checkpoints"),
            max_steps=task.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=task.learning_rate,
            lr_scheduler_type="constant",
            save_steps=task.save_every,
            save_total_limit=2,
            seed=0,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=Digits(),
        optimizers=(adamw(net, task), None),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder / "checkpoints")))
    return net


WAYS: dict[str, tuple[Callable[[Path, Task], nn.Module], str]] = {
    "Sheer": (in_sheer, "run/checkpoints/step-*"),
    "Lightning": (in_lightning, "checkpoints/*"),
    "HF Trainer": (in_transformers, "checkpoints/checkpoint-*"),
}


def child(train: Callable[[Path, Task], nn.Module], folder: Path, task: Task) -> int:
    """Fork a process that trains; its weights and what it warned of lie in the folder when it has ended."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.chdir(folder)
        with (folder / "output.txt").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            torch.set_num_threads(1)
            warnings.simplefilter("default")
            try:
                net = train(folder, task)
                (folder / "weights.pkl").write_bytes(pickle.dumps({k: v.numpy() for k, v in net.state_dict().items()}))
                status = 0
            except BaseException:
                traceback.print_exc(file=output)
            output.flush()
    finally:
        os._exit(status)


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def weights_of(folder: Path) -> Any:
    return pickle.loads((folder / "weights.pkl").read_bytes())


def same(one: Any, other: Any) -> bool:
    return all((one[name] == other[name]).all() for name in other)


def samples_of(folder: Path) -> dict[int, list[int]]:
    """Return the samples of each step, as it was made last."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines() if line.endswith("]")]
    return {step: numbers for step, numbers, _ in lines}


def repeated_and_skipped(samples: dict[int, list[int]], steps_per_epoch: int) -> tuple[int, int]:
    """Count samples that the steps of an epoch trained on more than once, and not at all."""
    repeated = skipped = 0
    for start in range(1, STEPS + 1, steps_per_epoch):
        seen = Counter(n for step in range(start, start + steps_per_epoch) for n in samples.get(step, []))
        repeated += sum(count - 1 for count in seen.values())
        skipped += BATCH * steps_per_epoch - len(seen)
    return repeated, skipped


def kills(name: str, number: int, whole: Path, seconds: float, draw: random.Random) -> dict[str, Any]:
    """Kill that many runs, each once, at a random instant; start each again to its end."""
    train, _ = WAYS[name]
    found: Counter[str] = Counter()
    right = weights_of(whole)
    for _ in range(number):
        folder = Path(tempfile.mkdtemp())
        process = child(train, folder, Task(STEPS))
        time.sleep(draw.uniform(0.0, seconds))
        os.kill(process, signal.SIGKILL)
        ended(process)
        found["resumed"] += ended(child(train, folder, Task(STEPS))) == 0
        if (folder / "weights.pkl").exists():
            found["equal"] += same(weights_of(folder), right)
            repeated, skipped = repeated_and_skipped(samples_of(folder), 20)
            found["repeated"] += repeated
            found["skipped"] += skipped
    return dict(found)


def corruptions(name: str, number: int, draw: random.Random) -> dict[str, Any]:
    """Flip a bit in the newest checkpoint of that many runs at their half, and start each again."""
    train, pattern = WAYS[name]
    found: Counter[str] = Counter()
    undamaged = Path(tempfile.mkdtemp())
    for steps in (STEPS // 2, STEPS):
        assert ended(child(train, undamaged, Task(steps))) == 0, (undamaged / "output.txt").read_text()[-2000:]
    right = weights_of(undamaged)
    for _ in range(number):
        folder = Path(tempfile.mkdtemp())
        assert ended(child(train, folder, Task(STEPS // 2))) == 0, (folder / "output.txt").read_text()[-2000:]
        (folder / "weights.pkl").unlink()
        newest = max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
        files = [newest] if newest.is_file() else [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size]
        if name == "Lightning":  # `last` is what it goes on from
            files = [folder / "checkpoints" / "last.ckpt"]
        file = draw.choice(files)
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(content))
        good = ended(child(train, folder, Task(STEPS))) == 0
        output = (folder / "output.txt").read_text()
        told = not good or "SheerWarning" in output or "damaged" in output
        found["noticed"] += told
        found["went on"] += good
        if good:
            found["equal"] += same(weights_of(folder), right)
            found["silently other"] += not told and not same(weights_of(folder), right)
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--corruptions", type=int, default=40)
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for module in ("sklearn.datasets", "torch._dynamo"):  # once, for all that are forked
        importlib.import_module(module)

    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}, seed {args.seed}"
    )
    for name in args.ways:
        importlib.import_module({"Sheer": "sheer", "Lightning": "lightning", "HF Trainer": "transformers"}[name])
        whole = Path(tempfile.mkdtemp())
        began = time.perf_counter()
        assert ended(child(WAYS[name][0], whole, Task(STEPS))) == 0, (whole / "output.txt").read_text()[-3000:]
        seconds = time.perf_counter() - began
        draw = random.Random(args.seed)
        print(f"{name}: a run takes {seconds:.1f} s", flush=True)
        print(f"  {args.kills} kills: {kills(name, args.kills, whole, seconds, draw)}", flush=True)
        print(f"  {args.corruptions} flipped bits: {corruptions(name, args.corruptions, draw)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
