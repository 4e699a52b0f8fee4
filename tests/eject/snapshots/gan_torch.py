"""A GAN that learns a ring of eight points: two networks, two optimizers, one step counts once. About fifteen seconds."""

# From `gan.py`, by `sheer eject` 0.1.0 (Apache License 2.0), for one process (set parallel="ddp" or "fsdp" for several ranks); it is yours, to change as you like.
# Settings: max_steps=2000, log_every_n_steps=500, checkpoint=Checkpoint(), run_dir='runs/gan', resume='auto'.

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dataclasses
import functools
import hashlib
import itertools
import json
import numpy as np
import os
import random
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer
from typing import Any

MAX_STEPS = 2000  # stop after this many steps, counted from the start of the run
LOG_EVERY_N_STEPS = 500  # steps between two log points; the only points where the host waits for the device
RUN_DIR = "runs/gan"  # the folder of the run; None: one named by the time, in runs/<script>
KEEP_LAST = 2  # how many of the newest checkpoints stay; with one, a damaged one has none before it
EXIT_STATUS = 85  # of a process that saved and left because it was told to
DURATIONS = "max_steps", "max_epochs", "max_time"


@dataclass(frozen=True, slots=True)
class Compute:
    """Where a step is computed, and in which precision."""

    device: torch.device
    dtype: torch.dtype | None = None  # what floating inputs are converted to, where the model was


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest_good(directory: Path) -> Path | None:
    """Return the newest checkpoint whose files are as they were written; None where there is none at all."""
    found = {path.parent: json.loads(path.read_text()) for path in sorted(directory.glob("step-*/manifest.json"))}
    for path, manifest in reversed(found.items()):
        files = manifest["files"].items()
        if all((path / name).is_file() and sha256(path / name) == file["sha256"] for name, file in files):
            return path
    if found:
        raise RuntimeError(f"No checkpoint in {directory} is as it was written. To start anew, give another run_dir.")
    (directory.parent / "metrics.jsonl").write_text("")  # of a run that was killed before its first save
    return None


def held_by(optimizer: Optimizer, model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model that an optimizer updates, in the model's order."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [parameter for parameter in model.parameters() if id(parameter) in held]


@dataclass(slots=True)
class Progress:
    """Where a run stands. A step counts once it has begun; all others count what is done."""

    step: int = 0  # steps, from the start of the run
    epoch: int = 0  # whole epochs
    batch: int = 0  # batches of the loader in the epoch that is running
    seconds: float = 0.0  # time spent between the start and the last save, earlier sessions counted in
    stopped_by: str | None = None  # why the run ended; None: it has not
    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation, or log point
    validated_at: int = -1  # the step of that validation
    saved_at: int = -1  # the step whose checkpoint holds all of the run as it is now; -1: something came since

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `asdict` returned."""
        for own in fields(self):
            setattr(self, own.name, state.get(own.name, getattr(self, own.name)))


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a callback or logger is told at the start of a run."""

    run_id: str
    run_dir: Path
    device: torch.device
    start_step: int  # the steps that were done before: 0, or where the run goes on
    steps_per_epoch: int | None


def _rebuilt(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Return a mapping of the same class with other values; a plain dict where the class cannot be built from one."""
    kind: Any = type(mapping)
    try:
        return kind(items)
    except TypeError:
        return items


def move(value: Any, device: torch.device) -> Any:
    """Return `value` with all tensors in it on `device`, and the floating ones as `dtype` if one is given."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, PackedSequence):  # a named tuple that must not be taken apart
        given = value.sorted_indices, value.unsorted_indices
        orders = [None if order is None else order.to(device) for order in given]
        return PackedSequence(value.data.to(device, None), value.batch_sizes, *orders)
    if hasattr(value, "to") and (not isinstance(value, type)):
        return value.to(device)
    if isinstance(value, Mapping):
        moved = {key: move(item, device) for key, item in value.items()}
        return moved if type(value) is dict else _rebuilt(value, moved)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(move(item, device) for item in value)
    if dataclasses.is_dataclass(value) and (not isinstance(value, type)):
        fields = {f.name: move(getattr(value, f.name), device) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value


class Data:
    """The batches of epoch after epoch, from any position on; the order of an epoch depends on the seed and its number alone."""

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self.seed = torch.initial_seed()
        self.steps_per_epoch = len(loader)

    def epochs(self, epoch: int, start: int, restore_random: Callable[[], None] | None) -> Iterator[tuple[Any, bool]]:
        """Yield each batch, and whether it ends its epoch; the first is batch `start` of `epoch`."""
        for number in itertools.count(epoch):
            mixed = int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
            self.loader.sampler.generator = torch.Generator().manual_seed(mixed)
            if restore_random is not None and start == 0:  # making an iterator draws a number
                restore_random()
            for index, batch in enumerate(self.loader, 1):
                self.loader.sampler.generator = None  # the epoch's order is drawn
                if index > start:
                    yield move(batch, self.device), index == len(self.loader)
                elif restore_random is not None and index == start:
                    restore_random()
            start = 0
            restore_random = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on."""
        samples = min(len(self.loader.dataset), len(self.loader) * self.loader.batch_size)
        order = {"seed": self.seed, "samples": samples, "batch_size": self.loader.batch_size, "shuffle": True}
        source = {**order, "generators": []}
        return {"kind": "GlobalOrderSource", "batches": len(self.loader), "source": source, "random": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the seed of the run that goes on."""
        self.seed = state["source"]["seed"]


def tensors_in(value: Any) -> Iterator[Tensor | PackedSequence]:
    """Yield the tensors in a batch, in order."""
    if isinstance(value, (Tensor, PackedSequence)):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and (not isinstance(value, type)):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def count_samples(batch: Any) -> int:
    """Count the samples of a batch: the leading dimension of the first tensor in it, 1 where there is none."""
    first = next(tensors_in(batch), None)
    if isinstance(first, PackedSequence):
        return int(first.batch_sizes[0])
    return first.shape[0] if first is not None and first.dim() > 0 else 1


class Steps:
    """The batches of step after step, each with its size, for a loop that counts the steps itself."""

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self.data = Data(loader, device)
        self.steps_per_epoch = self.data.steps_per_epoch
        self.at_end = False

    def steps(self, progress: Progress, restore_random: Callable[[], None] | None) -> Iterator[list[tuple[Any, int]]]:
        """Yield the batches of step after step, from `progress` on."""
        batches = self.data.epochs(progress.epoch, progress.batch, restore_random)
        for batch, at_end in batches:
            self.at_end = at_end
            yield [(batch, count_samples(batch))]

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on."""
        return self.data.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the seed of the run that goes on."""
        self.data.load_state_dict(state)


class Metrics:
    """Weighted means of what steps return. Adding does not wait for the device; reading does."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[Any, int]]] = {}

    def add(self, output: Any, samples: int, prefix: str = "") -> None:
        """Add what a step returned for a batch of `samples`."""
        for name, value in output.items() if isinstance(output, Mapping) else [("loss", output)]:
            kept = value.detach().clone() if isinstance(value, Tensor) else value
            self.rows.setdefault(prefix + name, []).append((kept, samples))

    def read(self) -> dict[str, float]:
        """Return the means, and start anew."""
        rows, self.rows = self.rows, {}
        return {
            name: sum(float(value) * samples for value, samples in values) / sum(samples for _, samples in values)
            for name, values in rows.items()
        }

    def __bool__(self) -> bool:
        return bool(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Return what was added since the last reading."""
        return {
            name: {"weighted": True, "folded": [list(torch.tensor(rows, dtype=torch.float64).T)]}
            for name, rows in self.rows.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.rows = {
            name: [pair for columns in saved["folded"] for pair in torch.stack(columns).T.tolist()]
            for name, saved in state.items()
        }


@dataclass(kw_only=True, slots=True)
class Run:
    """What `fit` and one's own loop work on."""

    model: nn.Module
    optimizers: Mapping[str, Optimizer]
    compute: Compute
    parameters: dict[Optimizer, list[nn.Parameter]]  # what each optimizer updates, in the model's order
    info: RunInfo
    scheduled_steps: int | None  # the steps that a function was asked to make a scheduler for
    data: Steps | None = None
    progress: Progress = field(default_factory=Progress)
    metrics: Metrics = field(default_factory=Metrics)
    watch: list[tuple[int, str, Tensor]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)


class StopSignals:
    """While entered, Ctrl-C and SIGTERM are remembered in `received`; the second leaves at once."""

    received: str | None = None

    def __enter__(self) -> StopSignals:
        self.before = {n: signal.signal(n, self.take) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def take(self, number: int, frame: object) -> None:
        """Note a signal."""
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def set_random_state(state: dict[str, Any]) -> None:
    """Put all generators of this process back into a state that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["accelerator"] is not None and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state_all(state["accelerator"])


def count_batches(run: Run, batch: list[tuple[Any, int]] | None, epoch_ended: bool) -> None:
    """Count what a step was trained on."""
    if batch is not None:
        run.progress.batch += len(batch)
    if epoch_ended:
        run.progress.epoch += 1
        run.progress.batch = 0


def check(watched: list[tuple[int, str, Tensor]]) -> None:
    """Raise an error that names the first value since the last check that was NaN or infinite."""
    for at, what, scalar in watched:
        if not scalar.isfinite():
            raise FloatingPointError(f"The {what} became NaN or infinite at step {at}.")
    watched.clear()


def report(run: Run, measured: dict[str, float]) -> None:
    """Hand metrics to the loggers and the console."""
    record = {"epoch": run.progress.epoch, **measured}
    with (run.info.run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": run.progress.step, "time": round(time.time(), 3), **record}) + "\n")
    print(
        f"step {run.progress.step:,}",
        *(f"{name} {value:.4g}" for name, value in measured.items()),
        sep=" · ",
        flush=True,
    )
    run.progress.saved_at = -1


def log_training(run: Run) -> None:
    """Read what the steps since the last log point returned, and hand it to the loggers. The host waits for the device here."""
    check(run.watch)
    logged = {f"train/{name}": value for name, value in run.metrics.read().items()}
    if run.progress.validated_at < 0:
        run.progress.metrics = logged
    report(run, logged)


def names_of(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Return the names of an optimizer's parameters, in its own order; those outside the model are numbered."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [known.get(id(parameter), f"#{index}") for index, parameter in enumerate(parameters)]


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the state of each parameter, and the groups, both by name."""
    names = names_of(optimizer, model)
    kept = optimizer.state_dict()
    named_groups = [{**group, "params": [names[index] for index in group["params"]]} for group in kept["param_groups"]]
    return {"state": {names[index]: values for index, values in kept["state"].items()}, "groups": named_groups}


def encode(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Return a value as JSON; the tensors in it go into `tensors`, named by their path."""
    match value:
        case Tensor() | np.ndarray():
            tensors[path] = torch.as_tensor(value).detach()
            return {"$tensor": path}
        case dict() if all(isinstance(key, str) for key in value):
            return {key: encode(item, tensors, f"{path}/{key}") for key, item in value.items()}
        case dict():
            return {"$dict": [[key, encode(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
        case list() | tuple():
            items = [encode(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        case float() if not math.isfinite(value):
            return {"$float": repr(value)}
    return value


def random_state() -> dict[str, Any]:
    """Return the states of all generators of this process, now or at a snapshot."""
    accelerator = torch.get_device_module().get_rng_state_all() if torch.accelerator.is_available() else None
    python = random.getstate()
    numpy = np.random.get_state(legacy=True)
    return {"python": python, "numpy": numpy, "torch": torch.get_rng_state(), "accelerator": accelerator}


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write(
    folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Any, run_id: str, measured: Any
) -> None:
    """Write a checkpoint; it counts once its manifest, which has the size and hash of every file, is renamed into place."""
    name = f"step-{step:08d}"
    numbers = [int(path.name.removeprefix(name).strip("-") or 1) for path in folder.glob(f"{name}*")]
    path = folder / (f"{name}-{max(numbers) + 1}" if numbers else name)  # this very step was saved before
    path.mkdir(parents=True)
    for name in sorted(groups):
        tensors = {key: value.cpu().clone().contiguous() for key, value in groups[name].items()}  # none shares memory
        save_file(tensors, path / f"{name}.safetensors", {"format": "pt"})
    (path / "state.json").write_text(json.dumps(state))
    files = {}
    for file in sorted(path.iterdir()):
        sync(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": sha256(file)}
    manifest = {"format": 2, "step": step, "torch": torch.__version__, "world_size": 1, "run_id": run_id}
    manifest |= {"metrics": measured, "settings": {}, "leads": [0], "files": files}
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (path / "manifest.tmp").write_text(json.dumps(manifest, indent=1))
    sync(path / "manifest.tmp")
    (path / "manifest.tmp").rename(path / "manifest.json")


def prune(directory: Path, step: int) -> None:
    """Point `last` and `best` at the newest and the best checkpoint, and delete what does not stay."""
    found = {path.parent: json.loads(path.read_text()) for path in sorted(directory.glob("step-*/manifest.json"))}
    # The newest of each step; what is left of later ones will be made again.
    saves = {manifest["step"]: path for path, manifest in found.items() if manifest["step"] <= step}
    staying = {*list(saves.values())[-KEEP_LAST:], *[]}
    (directory / ".last").unlink(missing_ok=True)
    (directory / ".last").symlink_to(saves[step].name)
    (directory / ".last").rename(directory / "last")
    for path in found.keys() - staying:
        (path / "manifest.json").unlink()
        shutil.rmtree(path)


def save(run: Run) -> None:
    """Write a checkpoint of the run as it is at the end of a step, and delete those that it makes superfluous."""
    check(run.watch)
    for weight, parameter in run.model.named_parameters():
        if parameter.requires_grad and (not parameter.isfinite().all()):
            raise FloatingPointError(f"{weight} is NaN or infinite after step {run.progress.step}, which is not saved.")
    own = dict[str, Tensor]()
    held = dict[str, Tensor]()
    optimizers = {name: optimizer_state(optimizer, run.model) for name, optimizer in run.optimizers.items()}
    state = encode(
        {
            "random": random_state(),
            "data": run.data.state_dict() if run.data is not None else None,
            "metrics": run.metrics.state_dict(),
            "progress": {**asdict(run.progress), "seconds": run.progress.seconds + time.monotonic() - run.began},
            "scheduled_steps": run.scheduled_steps,
            "schedulers": {},
            "scheduler_classes": {},
            "scaler": None,
            "callbacks": {},
            "loggers": {"JSONL": {"run": run.info.run_id, "size": (run.info.run_dir / "metrics.jsonl").stat().st_size}},
        },
        own,
    )
    state |= {"optimizers": encode(optimizers, held), "extra": {}}
    groups = {"model": run.model.state_dict(), "optimizer": held, "state": own}
    measured = run.progress.metrics if run.progress.validated_at == run.progress.step else {}
    write(run.info.run_dir / "checkpoints", run.progress.step, groups, state, run.info.run_id, encode(measured, {}))
    prune(run.info.run_dir / "checkpoints", run.progress.step)


def save_and_tell(run: Run) -> None:
    """Save, and tell the callbacks."""
    save(run)
    run.progress.saved_at = run.progress.step


def own_steps(run: Run, signals: StopSignals, state: dict[str, Any] | None, loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of one's own loop, on the device, and do after each what is due; without a loader, the step's number."""
    train = Steps(loader, run.compute.device)
    if run.progress.stopped_by is not None:
        if state is not None:
            set_random_state(state["random"])  # for what the script does next
        return
    run.data = train
    if state is not None:
        train.load_state_dict(state["data"])
    restore_random = functools.partial(set_random_state, state["random"]) if state is not None else None

    with signals:
        stream: Iterator[Any] = train.steps(run.progress, restore_random)
        for batch in stream:
            run.progress.step += 1
            given = batch[0][0]
            try:
                yield given
            except GeneratorExit:
                count_batches(run, batch, train.at_end)
                raise
            epoch_ended = train.at_end
            told = run.progress.stopped_by
            count_batches(run, batch, epoch_ended)
            stop = "max_steps" if run.progress.step >= MAX_STEPS else None
            if told is not None and stop is None:
                stop = told

            if stop is not None or run.progress.step % LOG_EVERY_N_STEPS == 0:
                log_training(run)

            if signals.received is not None and stop is None:
                stop = signals.received
            if stop is not None:
                run.progress.stopped_by = stop
                break
        save_and_tell(run)


def evaluate(model: nn.Module, step_function: Any, loaders: Any, compute: Compute) -> dict[str, float]:
    """Return the weighted means of what the step returns, over all batches."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    metrics = Metrics()
    for batch in loaders:
        samples = count_samples(batch)
        batch = move(batch, compute.device)
        with torch.no_grad():
            output = step_function(model, batch)
        metrics.add(output, samples)
    means = {"val/" + name: value for name, value in metrics.read().items()}
    for module in training:
        module.training = True
    return means


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int  # steps that were made, earlier sessions counted in
    metrics: dict[str, float]  # of the last validation; of the last log point where nothing was validated


class Loop:
    """A run whose loop is the script's own: it counts, logs, saves, stops and resumes."""

    def __init__(self, run: Run, state: dict[str, Any] | None) -> None:
        self.run = run
        self.state = state
        self.signals = StopSignals()
        self.finished = False

    @property
    def step(self) -> int:
        """The number of the step that is running; the first is 1."""
        return self.run.progress.step

    @property
    def epoch(self) -> int:
        """How many whole epochs are done."""
        return self.run.progress.epoch

    @property
    def epoch_ends(self) -> bool:
        """Whether the step that is running is the last of its epoch."""
        return self.run.data is not None and self.run.data.at_end

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """The optimizers by their names."""
        return self.run.optimizers

    @property
    def device(self) -> torch.device:
        """Where the model and the batches are."""
        return self.run.compute.device

    def steps(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Yield a batch on the device for each step, and after it do what is due; without a loader, the step's number."""
        yield from own_steps(self.run, self.signals, self.state, loader)
        if self.signals.received is not None:
            self.finish()

    def update(self, optimizer: Optimizer, step_function: Any, batch: Any) -> Any:
        """Train on a batch: forward, backward, clip, update, clear; returns what the step returned."""
        optimizer.zero_grad()
        output = self.backward(step_function, batch, optimizer)
        self.apply(optimizer)
        return output

    def backward(self, step_function: Any, batch: Any, optimizer: Optimizer | None = None) -> Any:
        """Add the gradients of a step's loss to what the parameters hold; returns what the step returned."""
        samples = count_samples(batch)
        name = next((name for name, own in self.run.optimizers.items() if own is optimizer), None)
        prefix = f"{name}/" if name is not None and len(self.run.optimizers) > 1 else ""
        run = self.run
        output = step_function(run.model, batch)
        loss = output if isinstance(output, Tensor) else output["loss"]
        loss.backward()
        run.watch.append((run.progress.step, "loss", loss.detach().clone()))
        run.metrics.add(output, samples, prefix)
        return output

    def apply(self, optimizer: Optimizer) -> None:
        """Clip the gradients of an optimizer's parameters, update them, clear the gradients, and move its scheduler."""

        optimizer.step()
        optimizer.zero_grad()

    def evaluate(self, step_function: Any, loader: Any) -> dict[str, float]:
        """Validate: run the step over all batches, log `val/<name>`, and let the best checkpoint be kept."""
        self.run.progress.epoch += self.epoch_ends  # this step is counted behind it
        run = self.run
        measured = evaluate(run.model, step_function, loader, run.compute)
        run.progress.metrics = measured
        run.progress.validated_at = run.progress.step
        report(run, measured)
        self.run.progress.epoch -= self.epoch_ends
        return dict(self.run.progress.metrics)

    def finish(self) -> Result:
        """End the run: log what is left, save, close the loggers."""
        progress = self.run.progress
        if progress.step > self.run.info.start_step and (not self.finished):
            self.finished = True
            progress.stopped_by = progress.stopped_by or "break"
            if self.run.metrics and (not (progress.stopped_by or "").startswith("SIG")):
                log_training(self.run)
            run = self.run
            saved = progress.saved_at == progress.step
            if not saved:
                save_and_tell(run)
        if self.signals.received is not None:
            raise SystemExit(EXIT_STATUS)
        run_2 = self.run
        return Result(step=run_2.progress.step, metrics=run_2.progress.metrics)


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `encode` was given."""
    match value:
        case list():
            return [decode(item, tensors) for item in value]
        case {"$tensor": name}:
            return tensors[name]
        case {"$tuple": parts}:
            return tuple(decode(parts, tensors))
        case {"$dict": pairs}:
            return dict(decode(pairs, tensors))
        case {"$float": text}:
            return float(text)
        case dict():
            return {key: decode(item, tensors) for key, item in value.items()}
    return value


def restore(run: Run, path: Path) -> dict[str, Any]:
    """Bring a run to where a checkpoint was made; return the states of the data and of the random numbers."""
    weights, trained = (next(map(load_file, path.glob(f"{group}.safetensors")), {}) for group in ("model", "training"))
    read = json.loads((path / "state.json").read_text())
    if read["progress"].get("owes_validation"):
        raise RuntimeError(f"{path} was saved in a validation, which only Sheer goes on with.")
    tensors = {**load_file(path / "optimizer.safetensors"), **load_file(path / "state.safetensors")}
    state = decode(read, tensors)
    run.model.load_state_dict(trained or weights)
    run.progress.load_state_dict(state["progress"])
    for name, optimizer in run.optimizers.items():  # after the schedulers, which may touch the groups
        saved = state["optimizers"][name]
        names = names_of(optimizer, run.model)
        index_of = {key: index for index, key in enumerate(names)}
        own_groups = optimizer.state_dict()["param_groups"]
        groups = [
            {**of_saved, "params": own["params"]} for own, of_saved in zip(own_groups, saved["groups"], strict=True)
        ]
        values = {index_of[key]: value for key, value in saved["state"].items()}
        optimizer.load_state_dict({"state": values, "param_groups": groups})
    os.truncate(run.info.run_dir / "metrics.jsonl", state["loggers"]["JSONL"]["size"])
    if (run.progress.stopped_by or "").startswith("SIG") or run.progress.stopped_by in DURATIONS:
        run.progress.stopped_by = "max_steps" if run.progress.step >= MAX_STEPS else None  # it may be longer now
    run.metrics.load_state_dict(state["metrics"])
    return {"data": state["data"], "random": state["random"]}


def start_loop(model: nn.Module, optimizers: Mapping[str, Any]) -> Loop:
    """Start a run without a loop."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    compute = Compute(device, None)
    model.to(compute.device)
    run_dir = Path(RUN_DIR)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").touch()  # a checkpoint notes how long it is
    checkpoint = newest_good(run_dir / "checkpoints")
    manifest = json.loads((checkpoint / "manifest.json").read_text()) if checkpoint is not None else None
    run_id = manifest["run_id"] if manifest is not None else secrets.token_hex(4)
    parameters = {
        optimizer: list(model.parameters()) if len(optimizers) == 1 else held_by(optimizer, model)
        for optimizer in optimizers.values()
    }
    progress = Progress()
    run = Run(
        model=model,
        optimizers=optimizers,
        compute=compute,
        parameters=parameters,
        info=RunInfo(run_id, run_dir, compute.device, manifest["step"] if manifest is not None else 0, None),
        scheduled_steps=None,
        data=None,
        progress=progress,
    )
    return Loop(run, restore(run, checkpoint) if checkpoint is not None else None)


NOISE, WIDTH = 8, 128


class GAN(nn.Module):
    """Both networks are one module: all of it is moved, saved and resumed together."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2)
        )
        self.critic = nn.Sequential(
            nn.Linear(2, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, 1)
        )

    def generate(self, count: int) -> Tensor:
        """Make points, [count, 2]."""
        return self.generator(torch.randn(count, NOISE, device=next(self.parameters()).device))


def critic_step(gan: GAN, batch: tuple[Tensor]) -> dict[str, Tensor]:
    real = batch[0].requires_grad_()
    judged = gan.critic(real)
    fake = gan.generate(len(real)).detach()
    (slope,) = torch.autograd.grad(judged.sum(), real, create_graph=True)
    penalty = slope.square().sum(1).mean()  # R1: Mescheder, Geiger and Nowozin, 2018
    loss = F.softplus(-judged).mean() + F.softplus(gan.critic(fake)).mean() + 0.05 * penalty
    return {"loss": loss, "penalty": penalty}


def generator_step(gan: GAN, batch: tuple[Tensor]) -> Tensor:
    return F.softplus(-gan.critic(gan.generate(len(batch[0])))).mean()


def ring(count: int) -> tuple[Tensor, Tensor]:
    """Return the eight centres [8, 2] and `count` points [count, 2] around them."""
    angles = torch.arange(8) * (2 * math.pi / 8)
    centres = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return centres, centres[torch.randint(8, (count,))] + 0.05 * torch.randn(count, 2)


def modes_step(gan: GAN, batch: tuple[Tensor]) -> dict[str, Tensor]:
    """How many of the eight points are hit, and how far the made points are from the nearest one."""
    centres = batch[0]
    nearest = torch.cdist(gan.generate(1000), centres).min(dim=1)
    hit = torch.bincount(nearest.indices[nearest.values < 0.3], minlength=8) >= 20
    return {"modes": hit.sum(), "distance": nearest.values.mean()}


def main() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    centres, points = ring(8192)
    gan = GAN()
    critic = torch.optim.Adam(gan.critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
    generator = torch.optim.Adam(gan.generator.parameters(), lr=1e-3, betas=(0.0, 0.9))

    run = start_loop(gan, {"critic": critic, "generator": generator})
    for batch in run.steps(DataLoader(TensorDataset(points), batch_size=256, shuffle=True)):
        run.update(critic, critic_step, batch)
        run.update(generator, generator_step, batch)
        if run.step % 500 == 0:
            run.evaluate(modes_step, [(centres,)])
    result = run.finish()
    print(f"after {result.step} steps {result.metrics['val/modes']:.0f} of 8 points are hit")


if __name__ == "__main__":
    main()
