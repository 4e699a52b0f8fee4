"""Scripts to eject: one small run, with what differs from row to row put in."""

from __future__ import annotations

HEAD = '''"""A small run."""

import sheer
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sheer.seed_everything(3)
x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
y = (x.sum(1) > 0).long()
train_loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
val_loader = DataLoader(TensorDataset(x[:40], y[:40]), batch_size=16)
model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model, batch):
    x, y = batch
    logits = model(x)
    return {"loss": F.cross_entropy(logits, y), "accuracy": (logits.argmax(-1) == y).float().mean()}


'''


def script(
    settings: str, call: str = "model, step, train_loader, val_loader, optimizer=optimizer", before: str = ""
) -> str:
    """Return a script with these settings, this call of fit, and statements before them."""
    return f"{HEAD}{before}trainer = sheer.Trainer({settings})\ntrainer.fit({call})\n"


SCHEDULER = """def scheduler(optimizer, total_steps):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=total_steps)


"""
CALL = "model, step, train_loader, val_loader, optimizer=optimizer"
WATCHED = "sheer.ModelSummary(depth=2), sheer.Profiler(wait=1, warmup=1, active=2)"
ON = "log_every_n_steps=4, run_dir='runs/here'"
OFF = "checkpoint=False, log_every_n_steps=4"

PACKED = """texts = [torch.arange(size) % 20 for size in (5, 9, 30, 2, 7, 16, 11, 3, 8, 40, 6)]
packed = sheer.data.Packed(texts, 12)
words = nn.Embedding(20, 12)


def word_step(model, batch):
    hidden = model(batch["tokens"])[:, None]
    hidden = F.scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=sheer.document_mask(batch["documents"]))
    return sheer.linear_cross_entropy(hidden[:, 0], model.weight, batch["targets"], chunk_size=10)


"""
ROWS: dict[str, str] = {
    "plain": script(f"max_epochs=2, {OFF}"),
    "steps": script(f"max_steps=9, {OFF}"),
    "both durations": script(f"max_steps=9, max_epochs=1, {OFF}"),
    "time": script(f"max_steps=9, max_time=1000.0, {OFF}"),
    "bf16": script(f"max_steps=9, precision='bf16-mixed', {OFF}"),
    "true bf16": script(f"max_steps=9, precision='bf16-true', {OFF}"),
    "double": script(f"max_steps=9, precision='64-true', {OFF}"),
    "16-mixed": script(f"max_steps=9, precision='16-mixed', {OFF}"),
    "norm": script(f"max_steps=9, gradient_clip_val=0.5, {OFF}"),
    "value": script(f"max_steps=9, gradient_clip_val=0.01, gradient_clip_algorithm='value', {OFF}"),
    "accumulate": script(f"max_epochs=2, accumulate_grad_batches=4, {OFF}"),
    "micro": script(f"max_epochs=2, micro_batch_size=5, {OFF}"),
    "both": script(f"max_epochs=2, accumulate_grad_batches=2, micro_batch_size=5, {OFF}"),
    "skip": script(f"max_steps=9, nonfinite='skip', {OFF}"),
    "ignore": script(f"max_steps=9, nonfinite='ignore', {OFF}"),
    "validate": script(f"max_steps=10, validate_every_n_steps=4, validate_first=True, limit_val_batches=2, {OFF}"),
    "no validation": script(f"max_steps=9, {OFF}", "model, step, train_loader, optimizer=optimizer"),
    "packed documents": script(
        f"max_epochs=2, {OFF}",
        "words, word_step, DataLoader(packed, 4, shuffle=True), optimizer=torch.optim.AdamW(words.parameters())",
        PACKED,
    ),
    "scheduler": script(f"max_epochs=2, {OFF}", f"{CALL}, scheduler=scheduler", SCHEDULER),
    "scheduler by epoch": script(
        f"max_epochs=3, scheduler_interval='epoch', {OFF}",
        f"{CALL}, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)",
    ),
    "plateau": script(
        f"max_epochs=3, monitor='val/loss', {OFF}",
        f"{CALL}, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)",
    ),
    "warmup": script(f"max_epochs=2, {OFF}", f"{CALL}, scheduler=sheer.warmup_cosine(warmup_steps=3)"),
    "optimizer by function": script(
        f"max_steps=9, {OFF}",
        "model, step, train_loader, val_loader, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1)",
    ),
    "early stopping": script(
        f"max_epochs=9, monitor='val/loss', callbacks=[sheer.EarlyStopping(patience=1, min_delta=5.0)], {OFF}"
    ),
    "ema": script(f"max_epochs=2, callbacks=[sheer.EMA(0.9)], {OFF}"),
    "monitors": script(
        f"max_steps=9, callbacks=[sheer.LearningRateMonitor(), sheer.GradientNorm(per_parameter=True)], {OFF}"
    ),
    "csv": script(f"max_steps=9, loggers=[sheer.CSV()], {OFF}"),
    "wandb": script(f"max_epochs=2, loggers=[sheer.WandB('p', mode='offline')], {OFF}"),
    "mlflow": script(f"max_epochs=2, loggers=[sheer.MLflow('p', tracking_uri='sqlite:///ml.db')], {OFF}"),
    "hparams": script(f"max_epochs=2, hparams={{'lr': 1e-2, 'width': 12}}, loggers=[sheer.TensorBoard()], {OFF}"),
    "freeze": script(f"max_epochs=2, callbacks=[sheer.Freeze('0.*', until_step=4)], {OFF}"),
    "freeze by epoch": script(f"max_epochs=2, callbacks=[sheer.Freeze('0.*', until_epoch=1)], {OFF}"),
    "swa": script(f"max_epochs=4, callbacks=[sheer.SWA(start_epoch=2, lr=1e-3, anneal_steps=3)], {OFF}"),
    "swa by steps": script(
        f"max_epochs=3, callbacks=[sheer.SWA(start_step=5, every_n_steps=2, bn_loader=False)], {ON}"
    ),
    "swa up to a step": script(f"max_steps=20, callbacks=[sheer.SWA(start_epoch=2)], {OFF}"),
    "watched": script(
        f"max_epochs=2, callbacks=[sheer.Timer(stop_after=1e3), sheer.DeviceStats(), sheer.Throughput(), {WATCHED}], {OFF}"
    ),
    "deterministic": script(f"max_steps=9, deterministic=True, {OFF}"),
    "compile": script(f"max_steps=3, compile=True, {OFF}"),
}

STREAM = """class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(list(zip(x[:40], y[:40])))


val_loader = DataLoader(Stream(), 16)
"""
COUNTED = """class Counted:
    def __init__(self):
        self.seen = 0

    def update(self, values):
        self.seen += int(values.sum())

    def compute(self):
        return self.seen

    def reset(self):
        self.seen = 0


counted = Counted()


def step(model, batch):
    counted.update(batch[1])
    return {"loss": F.cross_entropy(model(batch[0]), batch[1]), "ones": counted}


"""
BARE = """def step(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


"""
MEANS = """def step(model, batch):
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return {"loss": sheer.mean(losses, mask=batch[0][:, 0] > -0.5), "error": losses.mean(), "count": 1}


"""
NUMBERED = """def step(model, batch, step):
    return {"loss": F.cross_entropy(model(batch[0]), batch[1]) * (1 + step / 10)}


"""
OWN = """class Stopper:
    def __init__(self, at):
        self.at, self.seen = at, 0

    def on_step_end(self, step, model):
        self.seen += 1
        return "enough" if step == self.at else None

    def on_log(self, step, metrics):
        return {"train/seen": self.seen}


"""
SAVED = f"max_steps=15, monitor='val/loss', resume='auto', {ON}"
AUGMENTED = """class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return len(x)

    def __getitem__(self, index):
        return x[index] * random.random() + torch.rand(6) * np.random.rand(), y[index]


class Batched(Noisy):
    def __getitems__(self, indices):
        noise = torch.rand(len(indices), 6)
        return [(x[index] + noise[at], y[index]) for at, index in enumerate(indices)]


"""


def loading(given: str, settings: str = SAVED, before: str = "", step: str = "") -> str:
    """Return a run that trains on another loader."""
    text = script(settings, f"model, {step or 'step'}, DataLoader({given}), val_loader, optimizer=optimizer", before)
    return text.replace("import sheer\n", "import random\n\nimport numpy as np\nimport sheer\n", 1)


NAMED = """def join(samples):
    return {"x": torch.stack([x for x, _ in samples]), "y": torch.tensor([y for _, y in samples])}


def named_step(model, batch):
    return {"loss": F.cross_entropy(model(batch["x"]), batch["y"])}


val_loader = DataLoader(val_loader.dataset, 16, collate_fn=join)
"""
PAIRED = """def pair(samples):
    return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])


val_loader = DataLoader(val_loader.dataset, 16, collate_fn=pair)
"""
ALONE = """def alone(model, batch):
    return {"loss": model(batch).square().mean()}


val_loader = DataLoader(x[:40], 16)
"""
BACKWARDS = """class Backwards(torch.utils.data.Sampler):
    def __len__(self):
        return len(x)

    def __iter__(self):
        first = int(torch.randint(len(x), ()))
        return iter([(first - index) % len(x) for index in range(len(x))])


"""
STATEFUL = """class Stateful:
    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < len(x):
            self.at += 15
            yield x[self.at - 15 : self.at], y[self.at - 15 : self.at]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


"""
SKIPPED = """class Skipped:
    def __iter__(self):
        for at in range(0, len(x), 16):
            noise = torch.rand(1)
            yield x[at : at + 16] + noise, y[at : at + 16]


"""
# Loaders that a script keeps as they are, or nearly so: what comes out is short, and goes on from the library's checkpoints.
LOADERS = {
    "workers": loading("TensorDataset(x, y), 16, shuffle=True, num_workers=1", f"max_epochs=2, {OFF}"),
    "in order": loading("TensorDataset(x, y), 16", f"max_epochs=2, {OFF}"),
    "in order, saved": loading("Noisy(), 16", before=AUGMENTED),
    "drawn by this process": loading("Noisy(), 16, shuffle=True, drop_last=True, pin_memory=True", before=AUGMENTED),
    "drawn by workers": loading("Noisy(), 16, shuffle=True, num_workers=2, drop_last=True", before=AUGMENTED),
    "persistent workers": loading("Noisy(), 16, num_workers=2, persistent_workers=True", before=AUGMENTED),
    "batches drawn by workers": loading("Batched(), 16, shuffle=True, num_workers=2", before=AUGMENTED),
    "one loader for all": script(SAVED, "model, step, train_loader, train_loader, optimizer=optimizer"),
    "one loader with workers": script(SAVED, "model, step, train_loader, train_loader, optimizer=optimizer").replace(
        "shuffle=True)", "shuffle=True, num_workers=1, persistent_workers=True)"
    ),
    "batches with names": loading("TensorDataset(x, y), 16, collate_fn=join", step="named_step", before=NAMED),
    "pairs": loading("TensorDataset(x, y), 16, shuffle=True, collate_fn=pair", before=PAIRED),
    "tensors": loading("x, 16, shuffle=True", step="alone", before=ALONE),
}
# Loaders that are read as the library reads them.
READ_ALIKE = {
    "own sampler": loading("TensorDataset(x, y), 16, sampler=Backwards()", before=BACKWARDS),
    "weighted sampler": loading(
        "TensorDataset(x, y), 16, sampler=torch.utils.data.WeightedRandomSampler(list(range(1, 91)), 70)"
    ),
    "list, saved": script(SAVED, "model, step, list(train_loader), val_loader, optimizer=optimizer"),
    "own state": script(SAVED, "model, step, Stateful(), val_loader, optimizer=optimizer", before=STATEFUL),
    "skipped": script(
        SAVED, "model, step, Skipped(), val_loader, optimizer=optimizer, resume_by_skipping=True", before=SKIPPED
    ),
}
ROWS |= {
    "loss alone": script(f"max_epochs=2, {OFF}", before=BARE),
    "means": script(f"max_epochs=2, {OFF}", before=MEANS),
    "means in parts": script(f"max_epochs=2, micro_batch_size=5, accumulate_grad_batches=2, {OFF}", before=MEANS),
    "numbered": script(f"max_epochs=2, {OFF}", before=NUMBERED),
    "own callback": script(f"max_epochs=9, callbacks=[Stopper(7)], {OFF}", before=OWN),
    "callbacks elsewhere": script(f"max_epochs=9, callbacks=chosen, {OFF}", before=OWN + "chosen = [Stopper(7)]\n"),
    "function": script(f"max_steps=9, callbacks=[sheer.On(log=print)], {OFF}"),
    "several validations": script(
        f"max_epochs=2, monitor='val/one/loss', {OFF}",
        CALL.replace("val_loader", "{'one': val_loader, 'two': val_loader}"),
    ),
    "own validation": script(
        f"max_epochs=2, {OFF}",
        CALL + ", eval_step=check",
        "def check(model, batch):\n    return {'error': (model(batch[0]).argmax(-1) != batch[1]).float().mean()}\n\n\n",
    ),
    "result": script(f"max_epochs=2, {OFF}").replace("trainer.fit(", "result = trainer.fit(")
    + "print(result.metrics, result.step, result.stopped_by)\n",
    "saved": script(f"max_epochs=2, {ON}"),
    "saved often": script(f"max_epochs=3, monitor='val/loss', checkpoint=sheer.Checkpoint(every_n_steps=4), {ON}"),
    "goes on": script(
        f"max_epochs=3, monitor='val/loss', resume='auto', {ON}",
        f"{CALL}, scheduler=sheer.warmup_linear(warmup_steps=3)",
    ),
    "ema saved": script(f"max_epochs=2, callbacks=[sheer.EMA(0.9)], resume='auto', {ON}"),
    "skip saved": script(f"max_epochs=2, nonfinite='skip', resume='auto', gradient_clip_val=1.0, {ON}"),
    "tensorboard": script(f"max_epochs=2, loggers=[sheer.TensorBoard()], hparams={{'lr': 0.01}}, {ON}"),
    **LOADERS,
    **READ_ALIKE,
    "limited": script(f"max_epochs=2, limit_train_batches=3, {OFF}"),
    "overfit": script(f"max_epochs=3, overfit_batches=2, {OFF}"),
    "list": script(f"max_epochs=2, {OFF}", "model, step, list(train_loader), val_loader, optimizer=optimizer"),
    "fast": script("fast_dev_run=2, log_every_n_steps=1"),
    "two loggers": script(f"max_steps=9, loggers=[sheer.CSV(), sheer.TensorBoard()], {OFF}"),
    "another loader in parts": script(
        f"max_epochs=2, accumulate_grad_batches=4, {OFF}",
        "model, step, list(train_loader), val_loader, optimizer=optimizer",
    ),
    "saved before a line is logged": script(
        "max_steps=9, log_every_n_steps=100, checkpoint=sheer.Checkpoint(every_n_steps=2), run_dir='runs/here'"
    ),
    "validated on a stream": script(f"max_epochs=2, {OFF}", before=STREAM),
    "imported by another name": script(f"max_steps=9, {OFF}").replace(
        "import sheer\nimport torch\nfrom torch import nn\n", "import os, torch, sheer\nimport torch.nn as nn\n"
    ),
    "counted by an object": script(f"max_steps=14, validate_every_n_steps=3, {OFF}", before=COUNTED),
}

# What scripts do with a trainer besides one call of fit at the top. What they find out goes into a file beside them, which is compared.
NOTED = """
import json, sys
with open(sys.argv[0] + ".json", "w") as file:
    json.dump({noted}, file)
"""
MAIN = '''"""Built in a function, with settings from the command line."""

import argparse

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sheer


def step(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--clip", type=float, default=None)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--out", default="runs/here")
    args = parser.parse_args()
    sheer.seed_everything(3)
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))
    every = args.save_every * 1
    trainer = sheer.Trainer(
        max_epochs=args.epochs,
        gradient_clip_val=args.clip,
        deterministic=args.deterministic,
        log_every_n_steps=max(2, 1),
        run_dir=args.out,
        checkpoint=sheer.Checkpoint(every_n_steps=every),
        callbacks=[sheer.EMA(0.9)],
    )
    # what comes of it
    result = trainer.fit(model, step, loader, loader, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    print(result.metrics, trainer.device)


if __name__ == "__main__":
    main()
'''
CONFIGURED = """from dataclasses import dataclass


@dataclass
class Config:
    epochs: int = 2
    precision: str = "bf16-mixed"
    clip: float = 0.5
    monitor: str = "val/accuracy"


config = Config()
"""
ROWS |= {
    "chained": script(f"max_epochs=2, callbacks=[sheer.EMA(0.9)], {OFF}")
    .replace("\ntrainer = ", "\n")
    .replace("\ntrainer.", "."),
    "evaluated": script(f"max_epochs=2, monitor='val/loss', callbacks=[sheer.EMA(0.9)], {ON}").replace(
        "trainer.fit(", "result = trainer.fit("
    )
    + "best = trainer.test(model, step, val_loader, checkpoint='best')\n"
    + "now = trainer.validate(model, step, val_loader, limit_batches=2)\n"
    + "shapes = [list(out['loss'].shape) for out in trainer.predict(model, step, val_loader)]\n"
    + NOTED.format(
        noted="[best, now, shapes, result.step, result.stopped_by, trainer.device.type, result.best.name, result.last.name]"
    ),
    "tested without a name": script(f"max_epochs=2, loggers=[sheer.CSV()], {ON}")
    + "found = trainer.test(model, step, val_loader, checkpoint=str(trainer.run_dir / 'checkpoints' / 'last'))\n"
    + "rows = (trainer.run_dir / 'metrics.csv').read_text().count(',')\n"
    + "sheer.load_weights(model, trainer.run_dir, 'last')\n"
    + NOTED.format(noted="[found, rows, model[0].weight.tolist()]"),
    "main": MAIN,
    "configured": script(
        f"max_epochs=config.epochs, precision=config.precision, gradient_clip_val=config.clip, monitor=config.monitor, monitor_mode='max', {OFF}",
        before=CONFIGURED,
    ),
    "all at once": script(f"**options, {OFF}", before="options = dict(max_epochs=2, gradient_clip_val=0.3)\n"),
    "from settings": script("").replace(
        "sheer.Trainer()", "sheer.Trainer.from_settings(sheer.Settings(max_epochs=2, log_every_n_steps=4))"
    ),
}

# Loops of one's own.
TWO = """class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)


def a_step(two, batch):
    return {"loss": (two.a(batch[0]) - two.b(batch[0]).detach()).square().mean()}


def b_step(two, batch):
    return {"loss": (two.b(batch[0]) - batch[0].sum()).square().mean(), "size": two.b.weight.norm()}


two = Two()
a = torch.optim.Adam(two.a.parameters(), lr=0.01)
b = torch.optim.SGD(two.b.parameters(), lr=0.01)
trainer = sheer.Trainer({settings})
"""
LOOP = """for batch in run.steps(train_loader):
    run.update(b, b_step, batch)
    run.update(a, a_step, batch)
    if run.step % 5 == 0 or run.epoch_ends:
        run.evaluate(b_step, val_loader)
result = run.finish()
""" + NOTED.format(noted="[result.metrics, result.step, result.epoch, result.stopped_by]")


def loop(settings: str, start: str, rest: str = LOOP) -> str:
    """Return a script with a loop of its own: `start` is the call that starts it, `rest` what comes behind."""
    return HEAD + TWO.replace("{settings}", settings) + start + "\n" + rest


START = "run = trainer.start(two, optimizers={'a': a, 'b': b})"
ROWS |= {
    "loop": loop(f"max_epochs=2, {OFF}", START),
    "loop saved": loop(f"max_steps=13, gradient_clip_val=0.5, monitor='val/loss', resume='auto', {ON}", START),
    "loop scheduled": loop(
        f"max_steps=9, callbacks=[sheer.EMA(0.9), sheer.LearningRateMonitor()], loggers=[sheer.CSV()], {ON}",
        "run = trainer.start(two, optimizers={'a': a, 'b': b}, schedulers={'a': sheer.warmup_cosine(warmup_steps=3)})",
    ),
    "loop in parts": loop(
        f"max_epochs=2, accumulate_grad_batches=2, micro_batch_size=5, {OFF}",
        "with trainer.start(two, optimizers={'a': a, 'b': b}) as run:",
        """    for batch in run.steps(train_loader):
        run.log({"epoch": run.epoch})
        a.zero_grad()
        run.backward(a_step, batch, a)
        run.apply(a)
        run.update(b, b_step, batch)
        if run.step == 7:
            break
""",
    ),
    "loop without a loader": loop(
        f"max_steps=9, precision='bf16-mixed', resume='auto', {ON}",
        START,
        """for number in run.steps():
    run.update(a, a_step, (torch.randn(8, 6) + number,))
    run.update(b, b_step, (torch.randn(5, 6),))
result = run.finish()
""",
    ),
}
ROWS |= {
    "loop tested": loop(
        f"max_epochs=2, monitor='val/loss', loggers=[sheer.CSV()], {ON}",
        START,
        LOOP.replace(
            "import json", "found = trainer.test(two, b_step, val_loader, checkpoint='best')\nimport json"
        ).replace("[result.metrics", "[found, trainer.run_dir.exists(), trainer.device.type, result.metrics"),
    ),
}

# Rows whose `fit` can be written out as a loop over the library's parts, too.
AS_LOOPS = (
    "steps", "bf16", "accumulate", "validate often", "scheduler", "scheduler by epoch", "plateau", "warmup", "optimizer by function", "early stopping",
    "ema", "several validations", "own validation", "saved often", "goes on", "evaluated", "no validation", "main",
)  # fmt: skip
ROWS["validate often"] = script(f"max_steps=10, validate_every_n_steps=4, limit_val_batches=2, {OFF}")

# Runs on several ranks: how many, and the script.
PLAN = """from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
"""
ON_RANKS: dict[str, tuple[int, str]] = {
    "DDP": (2, script(f"max_epochs=2, parallel='ddp', gradient_clip_val=0.5, {OFF}", before=MEANS)),
    "DDP, accumulated": (
        2,  # of every second batch, which has one sample, the second rank has none
        script(f"max_epochs=4, parallel='ddp', accumulate_grad_batches=2, {OFF}").replace("batch_size=16, sh", "batch_size=89, sh"),
    ),
    "FSDP2, 16 bits": (
        2,
        script(f"max_epochs=2, parallel='fsdp', precision='bf16-mixed', micro_batch_size=3, gradient_clip_val=0.5, {OFF}"),
    ),
    "FSDP2": (
        2,  # each rank has statistics of its own, and evaluates with those of the first
        script(f"max_epochs=2, parallel='fsdp', micro_batch_size=5, gradient_clip_val=0.5, {OFF}").replace("nn.Tanh()", "nn.BatchNorm1d(12)"),
    ),
    "TP x FSDP2": (
        4,
        script(f"max_epochs=2, parallel=sheer.Parallel(tp=2), gradient_clip_val=0.5, {OFF}", f"{CALL}, parallelize=plan", PLAN + MEANS),
    ),
}  # fmt: skip
