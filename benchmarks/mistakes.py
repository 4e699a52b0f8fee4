"""When common mistakes are named: before step 1, later, or never; by Sheer, the Lightning Trainer and the HF Trainer.

    python benchmarks/mistakes.py            # under a minute on two cores
    python benchmarks/mistakes.py NaN loss   # those with these words in their names, with all that was said

Each mistake is made the way each framework's users would make it, in a process forked for it, with a time limit. An error or a
warning counts if it mentions the cause (one of the words beside the mistake, in its text); any other error counts as "unclear",
which is for the reader's information: it did stop. "Before step 1" is before any optimizer has changed a parameter.
"""

from __future__ import annotations

import copy
import datetime
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "warning"

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

SECONDS = 60
FRAMEWORKS = ("Sheer", "Lightning", "HF Trainer")


def tensors(samples: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


class Rows(Dataset[Any]):
    """The same data as dicts, which the HF Trainer takes."""

    def __init__(self, samples: int = 64) -> None:
        self.data = tensors(samples)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return {"x": x, "labels": y}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


class WithLoss(nn.Module):
    """A model as the HF Trainer takes one. What `mistake` returns replaces what its forward returns."""

    def __init__(self, mistake: Callable[[torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        self.net, self.mistake = net(), mistake

    def forward(self, x: Any, labels: Any = None) -> Any:
        output = self.net(x)
        loss = F.mse_loss(output, labels)
        returned = loss if self.mistake is None else self.mistake(loss)
        return {"loss": returned, "logits": output} if isinstance(returned, torch.Tensor) else returned


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(tensors(), batch_size=8, **options)


# The right program of each framework; a mistake replaces a part of it.


def sheer(
    mistake: Callable[[torch.Tensor], Any] | None = None, *, model: Any = None, train: Any = None, val: Any = None,
    optimizer: Any = None, scheduler: Any = None, step: Any = None, **settings: Any,
) -> None:  # fmt: skip
    import sheer as package

    model = model or net()

    def right(model: nn.Module, batch: Any) -> Any:
        loss = F.mse_loss(model(batch[0]), batch[1])
        return {"loss": loss} if mistake is None else mistake(loss)

    optimizer = optimizer(model) if callable(optimizer) and not isinstance(optimizer, type) else optimizer
    settings = {"max_epochs": 2, **settings}
    package.Trainer(**settings).fit(
        model,
        step or right,
        loader() if train is None else train,
        val,
        optimizer=AdamW(model.parameters(), lr=1e-2) if optimizer is None else optimizer,
        scheduler=scheduler,
    )


def lightning(
    mistake: Callable[[torch.Tensor], Any] | None = None, *, model: Any = None, train: Any = None, val: Any = None,
    configure: Any = None, monitor: Any = None, ckpt_path: Any = None, **settings: Any,
) -> None:  # fmt: skip
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model or net()

        def loss(self, batch: Any) -> Any:
            return F.mse_loss(self.net(batch[0]), batch[1])

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.loss(batch)
            return loss if mistake is None else mistake(loss)

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self) -> Any:
            return AdamW(self.parameters(), lr=1e-2) if configure is None else configure(self)

    callbacks = [ModelCheckpoint(monitor=monitor)] if monitor else []
    callbacks += settings.pop("callbacks", [])
    settings = {
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **settings,
    }
    settings.setdefault("accelerator", "cpu")
    L.Trainer(callbacks=callbacks, **settings).fit(
        Module(), loader() if train is None else train, val, ckpt_path=ckpt_path
    )


def hf(
    mistake: Callable[[torch.Tensor], Any] | None = None, *, model: Any = None, train: Any = None, evaluated: Any = None,
    optimizers: Any = (None, None), callbacks: Any = None, resume: Any = None, collator: Any = None, **settings: Any,
) -> None:  # fmt: skip
    from transformers import Trainer, TrainingArguments

    model = WithLoss(mistake) if model is None else model
    if callable(optimizers):
        optimizers = optimizers(model)
    settings = {
        "output_dir": "out", "num_train_epochs": 2, "per_device_train_batch_size": 8, "report_to": [],
        "disable_tqdm": True, "use_cpu": True, **settings,
    }  # fmt: skip
    Trainer(
        model,
        TrainingArguments(**settings),
        train_dataset=Rows() if train is None else train,
        eval_dataset=evaluated,
        optimizers=optimizers,
        callbacks=callbacks,
        data_collator=collator,
    ).train(resume_from_checkpoint=resume)


# The mistakes: a name, the words of which a message must have one, and the program of each framework.

Program = Callable[[], None]
MISTAKES: dict[str, tuple[str, Program, Program, Program]] = {}


def mistake(name: str, words: str, *programs: Program) -> None:
    MISTAKES[name] = (words, *programs)  # type: ignore[assignment]


def every_loss(name: str, words: str, change: Callable[[torch.Tensor], Any]) -> None:
    mistake(name, words, lambda: sheer(change), lambda: lightning(change), lambda: hf(change))


every_loss("a step that returns None", "None|return", lambda loss: None)
every_loss("a mapping without a loss", "loss", lambda loss: {"mse": loss})
every_loss("a loss that is no scalar", "scalar|shape", lambda loss: loss.expand(3) * 1.0)
every_loss("a detached loss", "grad", lambda loss: loss.detach())
every_loss("a loss read with .item()", r"item\(\)|float|number", lambda loss: {"loss": loss.item()})
every_loss("a tuple where the loss is not named", "tuple|must return a Tensor", lambda loss: (loss.detach(), loss))
every_loss("a NaN loss", r"nan\b|finite|infinit", lambda loss: loss * float("nan"))


def stop_iteration(loss: torch.Tensor) -> Any:
    counted.append(1)
    return loss if len(counted) < 4 else next(iter(()))


counted: list[int] = []
every_loss("a StopIteration in the step", "StopIteration", stop_iteration)


class StoppingRows(Dataset[Any]):
    def __init__(self, rows: Dataset[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        if index == 40:
            raise StopIteration
        return self.rows[index]


stopping = DataLoader(StoppingRows(tensors()), batch_size=8)
mistake(
    "a StopIteration in the dataset", "StopIteration|ended after",
    lambda: sheer(train=stopping), lambda: lightning(train=stopping), lambda: hf(train=StoppingRows(Rows())),
)  # fmt: skip
mistake(
    "an optimizer of another model", "optimizer|parameters",
    lambda: sheer(optimizer=lambda model: AdamW(net().parameters())),
    lambda: lightning(configure=lambda module: AdamW(net().parameters())),
    lambda: hf(optimizers=lambda model: (AdamW(net().parameters()), None)),
)  # fmt: skip


def sheer_copied() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    sheer(model=copy.deepcopy(model), optimizer=optimizer)


def lightning_copied() -> None:
    first = net()
    optimizer = AdamW(first.parameters())
    lightning(model=copy.deepcopy(first), configure=lambda module: optimizer)


def hf_copied() -> None:
    model = WithLoss()
    optimizer = AdamW(model.parameters())
    hf(model=copy.deepcopy(model), optimizers=(optimizer, None))


mistake(
    "an optimizer built before the model was copied", "optimizer|parameters", sheer_copied, lightning_copied, hf_copied
)
mistake(
    "a layer that no optimizer has", "0.weight|never be trained|not in the optimizer",
    lambda: sheer(optimizer=lambda model: AdamW(model[2].parameters())),
    lambda: lightning(configure=lambda module: AdamW(module.net[2].parameters())),
    lambda: hf(optimizers=lambda model: (AdamW(model.net[2].parameters()), None)),
)  # fmt: skip
mistake(
    "the class of an optimizer", "class|type|Optimizer",
    lambda: sheer(optimizer=AdamW), lambda: lightning(configure=lambda module: AdamW), lambda: hf(optimizers=(AdamW, None)),
)  # fmt: skip


def stray(optimizer: Any = None) -> Any:
    return StepLR(SGD(net().parameters(), lr=0.1), 1)


mistake(
    "a scheduler on another optimizer", "scheduler|optimizer",
    lambda: sheer(scheduler=stray()),
    lambda: lightning(configure=lambda module: ([AdamW(module.parameters())], [stray()])),
    lambda: hf(optimizers=lambda model: (AdamW(model.parameters()), stray())),
)  # fmt: skip


def short(optimizer: Any) -> Any:
    return OneCycleLR(optimizer, 0.1, total_steps=8)


def sheer_short() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    sheer(model=model, optimizer=optimizer, scheduler=short(optimizer))


def lightning_short() -> None:
    def configure(module: Any) -> Any:
        optimizer = AdamW(module.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": short(optimizer), "interval": "step"}}

    lightning(configure=configure)


def hf_short() -> None:
    def optimizers(model: nn.Module) -> Any:
        optimizer = AdamW(model.parameters())
        return optimizer, short(optimizer)

    hf(optimizers=optimizers)


mistake(
    "a OneCycleLR that ends before the run",
    "total_steps|number of total steps|ends after",
    sheer_short,
    lightning_short,
    hf_short,
)
mistake(
    "a ReduceLROnPlateau without a metric", "monitor|metric|ReduceLROnPlateau|reduce_lr_on_plateau",
    lambda: sheer(scheduler=lambda optimizer, total: ReduceLROnPlateau(optimizer)),
    lambda: lightning(configure=lambda m: {"optimizer": (o := AdamW(m.parameters())), "lr_scheduler": ReduceLROnPlateau(o)}),
    lambda: hf(lr_scheduler_type="reduce_lr_on_plateau"),
)  # fmt: skip
mistake(
    "a monitored metric that is not there", "val_los|val/los|eval_los",
    lambda: sheer(val=loader(), monitor="val/los"),
    lambda: lightning(val=loader(), monitor="val_los"),
    lambda: hf(
        evaluated=Rows(), eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="eval_los",
    ),
)  # fmt: skip
mistake(
    "an unknown setting", "max_epoch|num_epoch|unexpected",
    lambda: sheer(max_epoch=2), lambda: lightning(max_epoch=2), lambda: hf(num_epochs=2),
)  # fmt: skip
mistake(
    "a misspelt precision", "precision|bf16|unexpected",
    lambda: sheer(precision="bf16_mixed"), lambda: lightning(precision="bf16_mixed"), lambda: hf(bf_16=True),
)  # fmt: skip
mistake(
    "a number of epochs as a string", "max_epochs|num_train_epochs|must be an? int|'<' not supported|str",
    lambda: sheer(max_epochs="2"), lambda: lightning(max_epochs="2"), lambda: hf(num_train_epochs="2"),
)  # fmt: skip
mistake(
    "a negative limit on the gradient", "clip|max_grad_norm|norm",
    lambda: sheer(gradient_clip_val=-1.0), lambda: lightning(gradient_clip_val=-1.0), lambda: hf(max_grad_norm=-1.0),
)  # fmt: skip


class EmptyRows(Rows):
    def __len__(self) -> int:
        return 0


empty = DataLoader(TensorDataset(torch.empty(0, 4), torch.empty(0, 1)), batch_size=8)
mistake(
    "an empty dataset", "empty|num_samples|no batch|zero|not contain|0 batches",
    lambda: sheer(train=empty), lambda: lightning(train=empty), lambda: hf(train=EmptyRows()),
)  # fmt: skip
mistake(
    "drop_last leaves nothing", "drop_last|empty|no batch|zero|fewer|0 batches|not contain|batch size",
    lambda: sheer(train=DataLoader(tensors(5), batch_size=8, drop_last=True)),
    lambda: lightning(train=DataLoader(tensors(5), batch_size=8, drop_last=True)),
    lambda: hf(train=Rows(5), dataloader_drop_last=True),
)  # fmt: skip


class Liar(IterableDataset[Any]):
    """Says that it has 64 samples, and has 40."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return (self.rows[index] for index in range(40))

    def __len__(self) -> int:
        return 64


mistake(
    "a dataset whose length says too much", "len|ended after|fewer|not enough|number of samples",
    lambda: sheer(train=DataLoader(Liar(tensors()), batch_size=8)),
    lambda: lightning(train=DataLoader(Liar(tensors()), batch_size=8)),
    lambda: hf(train=Liar(Rows())),
)  # fmt: skip


class Callback:
    def on_step_finished(self, *arguments: Any, **more: Any) -> None: ...


def lightning_callback() -> None:
    from lightning.pytorch.callbacks import Callback as Base

    lightning(callbacks=[type("Mine", (Callback, Base), {})()])


def hf_callback() -> None:
    from transformers import TrainerCallback

    hf(callbacks=[type("Mine", (Callback, TrainerCallback), {})()])


mistake(
    "a callback with a misspelt event",
    "on_step_finished",
    lambda: sheer(callbacks=[Callback()]),
    lightning_callback,
    hf_callback,
)


def sheer_resumed() -> None:
    how: dict[str, Any] = {"run_dir": "run", "resume": "auto"}
    sheer(**how, max_epochs=1)
    begun()
    sheer(**how, optimizer=lambda model: SGD(model.parameters(), lr=1e-2))


def lightning_resumed() -> None:
    import lightning as L

    how: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": "run"}
    keep = L.pytorch.callbacks.ModelCheckpoint(dirpath="run", filename="kept")
    lightning(**how, callbacks=[keep], max_epochs=1)
    begun()
    lightning(**how, ckpt_path="run/kept.ckpt", configure=lambda module: SGD(module.parameters(), lr=1e-2))


def hf_resumed() -> None:
    how: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8}
    hf(**how, num_train_epochs=1, optimizers=lambda model: (AdamW(model.parameters(), lr=1e-2), None))
    begun()
    hf(**how, resume=True, optimizers=lambda model: (SGD(model.parameters(), lr=1e-2), None))


mistake("going on with another optimizer", "optimizer|Adam|SGD", sheer_resumed, lightning_resumed, hf_resumed)


def sheer_resumed_rows() -> None:
    how: dict[str, Any] = {"run_dir": "run", "resume": "auto"}
    sheer(**how, max_epochs=1)
    begun()
    sheer(**how, train=DataLoader(tensors(48), batch_size=4))


def lightning_resumed_rows() -> None:
    import lightning as L

    how: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": "run"}
    keep = L.pytorch.callbacks.ModelCheckpoint(dirpath="run", filename="kept")
    lightning(**how, callbacks=[keep], max_epochs=1)
    begun()
    lightning(**how, ckpt_path="run/kept.ckpt", train=DataLoader(tensors(48), batch_size=4))


def hf_resumed_rows() -> None:
    how: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8}
    hf(**how, num_train_epochs=1)
    begun()
    hf(**how, resume=True, train=Rows(48), per_device_train_batch_size=4)


mistake(
    "going on with other data and batch size",
    "batch|samples|data|do not match",
    sheer_resumed_rows,
    lightning_resumed_rows,
    hf_resumed_rows,
)


# Making each mistake in a process of its own, and reading what was said.


def begun() -> None:
    """Forget what was said and done so far: only what follows is the mistake."""
    os.write(2, b"\n#### begun\n")


def make(program: Program) -> tuple[str, str]:
    """Make a mistake in a forked process; return its output, and how it ended: "done", "error" or "too long"."""
    folder = tempfile.mkdtemp()
    path = Path(folder) / "output"
    child = os.fork()
    if child == 0:
        run_in(Path(folder), path, program)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return path.read_text(errors="replace"), "done" if status == 0 else "error"
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return path.read_text(errors="replace"), "too long"


def run_in(folder: Path, path: Path, program: Program) -> None:
    """Run a program in the forked process, everything that it says into a file; never returns."""
    status = 1
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    try:
        os.chdir(folder)
        register_optimizer_step_post_hook(lambda *_: os.write(2, b"\n#### update\n"))
        warnings.showwarning = lambda message, kind, *_: os.write(2, f"\n#### said: {message}\n".encode())  # type: ignore[assignment]
        warnings.simplefilter("always")
        program()
        status = 0
    except BaseException as error:
        notes = " ".join(getattr(error, "__notes__", []))
        text = f"{type(error).__name__}: {error} {notes}".replace("\n", " ")
        os.write(2, f"\n#### said: {text}\n".encode())
    finally:
        os._exit(status)


def judged(words: str, output: str, how: str) -> tuple[str, str]:
    """Return when the mistake was named, and by which words."""
    output = output.rsplit("#### begun", 1)[-1]
    updates = 0
    for line in output.splitlines():
        updates += line.startswith("#### update")
        names = not line.startswith("#### update") and re.search(words, line, re.IGNORECASE)
        if names and (line.startswith("#### said") or re.search("warn|error", line, re.IGNORECASE)) and not noise(line):
            return ("before step 1" if updates == 0 else "later"), line
    said = [line for line in output.splitlines() if line.startswith("#### said") and not noise(line)]
    if how == "error":
        return "unclear", said[-1] if said else ""
    return ("too long" if how == "too long" else "never"), ""


def noise(line: str) -> bool:
    """Whether a warning is one that the right program gives, too."""
    return any(re.sub(r"\d+", "", line) == re.sub(r"\d+", "", known) for known in USUAL)


USUAL: set[str] = set()


def learn_the_usual() -> None:
    """Run the right programs, of which none may fail, and keep what they say."""
    for name, program in zip(FRAMEWORKS, (sheer, lightning, hf), strict=True):
        output, how = make(program)
        assert how == "done", f"{name} failed without a mistake:\n{output}"
        USUAL.update(line for line in output.splitlines() if not line.startswith("#### update"))


def main() -> None:
    """Make all mistakes, or those whose names have the given words, and print the table."""
    import lightning
    import lightning.pytorch
    import transformers
    from transformers import Trainer  # noqa: F401  loaded once, before the forks

    import sheer as package

    learn_the_usual()
    wanted = " ".join(sys.argv[1:])
    chosen = {name: entry for name, entry in MISTAKES.items() if wanted in name}
    totals = {
        framework: dict.fromkeys(("before step 1", "later", "unclear", "never", "too long"), 0)
        for framework in FRAMEWORKS
    }
    rows = []
    for name, (words, *programs) in chosen.items():
        row = [name]
        for framework, program in zip(FRAMEWORKS, programs, strict=True):
            output, how = make(program)
            when, line = judged(words, output, how)
            if wanted:
                print(output)
            totals[framework][when] += 1
            row.append(when)
            print(f"{name} · {framework} · {when}: {line.removeprefix('#### said: ')[:150]}", flush=True)
        rows.append(row)

    print(f"\n{datetime.date.today()}, sheer {package.__version__}, lightning {lightning.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, torch {metadata.version('torch')}\n")
    print(f"| mistake | {' | '.join(FRAMEWORKS)} |\n|---|{'---|' * len(FRAMEWORKS)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    for when in ("before step 1", "later", "unclear", "never", "too long"):
        print(f"| **{when}** | {' | '.join(f'**{totals[framework][when]}**' for framework in FRAMEWORKS)} |")


if __name__ == "__main__":
    main()
