"""A small GPT that learns to write Python, from the source of Python's own standard library. About two minutes on two cores.

Ctrl-C stops it and saves; the same command again goes on where it was.
"""

# From `gpt.py`, by `sheer eject` 0.1.0 (Apache License 2.0), for one process (set parallel="ddp" or "fsdp" for several ranks); it is yours, to change as you like.
# Settings: max_steps=600, gradient_clip_val=1.0, log_every_n_steps=20, validate_every_n_steps=100, monitor='val/loss', checkpoint=Checkpoint(every_n_steps=100), run_dir='runs/gpt', resume='auto'.

from __future__ import annotations

import json
import math
import sysconfig
import zlib
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import dataclasses
import functools
import hashlib
import itertools
import numpy as np
import operator
import os
import random
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from safetensors.torch import load_file, save_file
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.tensorboard import SummaryWriter
from typing import Any

MAX_STEPS = 600  # stop after this many steps, counted from the start of the run
GRADIENT_CLIP_VAL = 1.0  # clip gradients to this norm, or to this absolute value
LOG_EVERY_N_STEPS = 20  # steps between two log points; the only points where the host waits for the device
VALIDATE_EVERY_N_STEPS = 100  # steps between validations; None: at the end of each epoch
MONITOR = "val/loss"  # the metric that says which checkpoint is best, such as "val/loss"
CHECKPOINT_EVERY_N_STEPS = 100  # save after every n-th step; None: not by steps
KEEP_LAST = 2  # how many of the newest checkpoints stay; with one, a damaged one has none before it


def load_weights(model: nn.Module, source: str | Path, which: str = "best") -> Path:
    """Load the weights of a run, a checkpoint, or a safetensors file into a model, and return where they are from."""
    path = Path(source)
    path = (path / "checkpoints" / which).resolve() if (path / "checkpoints").is_dir() else path
    model.load_state_dict(load_file(path if path.is_file() else path / "model.safetensors"))
    return path


def _scheduler(factor: Callable[..., float], optimizer: Optimizer, total_steps: int) -> LambdaLR:
    return LambdaLR(optimizer, functools.partial(factor, total=total_steps))


def cosine_factor(step: int, *, total: int, warmup: int, final: float) -> float:
    """Return what the rate is multiplied by in a step (counted from 0) of `warmup_cosine`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    part = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * part))


Schedule = Callable[[Optimizer, int], LambdaLR]  # what `fit(scheduler=...)` takes


def warmup_cosine(warmup_steps: int, final_factor: float = 0.0) -> Schedule:
    """Rise linearly over `warmup_steps`, then fall along half a cosine to `final_factor` of the rate (Loshchilov, Hutter 2017)."""
    return functools.partial(_scheduler, functools.partial(cosine_factor, warmup=warmup_steps, final=final_factor))


class LearningRateMonitor:
    """Logs the learning rate at each log point, as the schedulers have left it for the next step."""

    def __init__(self) -> None:
        self._optimizers: Mapping[str, Optimizer] = {}

    def on_fit_start(self, optimizers: Mapping[str, Optimizer]) -> None:
        """Keep the optimizers."""
        self._optimizers = optimizers

    def on_log(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        """Return the values of all groups."""
        logged: dict[str, float] = {}
        for label, optimizer in self._optimizers.items():
            groups = optimizer.param_groups
            for index, group in enumerate(groups):
                place = f"/{label}" if len(self._optimizers) > 1 else ""
                place += f"/{group.get('name', index)}" if len(groups) > 1 else ""
                logged[f"lr{place}"] = float(group["lr"])
        return logged


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a callback or logger is told at the start of a run."""

    run_id: str
    run_dir: Path
    device: torch.device
    start_step: int  # the steps that were done before: 0, or where the run goes on
    steps_per_epoch: int | None


def tokens_of(tokens: int | str | Callable[[Any], int | Tensor], part: Any, samples: int) -> int | Tensor:
    """Count the tokens of a batch, as `Throughput` is told to."""
    if isinstance(tokens, int):
        return tokens * samples
    if isinstance(tokens, str):
        return int(part[tokens].numel())
    counted_tokens = tokens(part)
    return counted_tokens.detach() if isinstance(counted_tokens, Tensor) else counted_tokens


class Throughput:
    """Logs the speed since the last log point; the time of validations and saves is left out."""

    def __init__(self, *, tokens: int | str | Callable[[Any], int | Tensor] | None = None) -> None:
        self.tokens = tokens
        self._samples, self._step = 0, 0
        self._counts: list[int | Tensor] = []
        self._since: float | None = None
        self._left_out = self._paused = self._step_ended = 0.0

    def on_fit_start(self, info: RunInfo) -> None:
        """Find out the peak."""
        self._step, self._since = info.start_step, None

    def on_step_start(self, batch: Any) -> None:
        """Count what the step trains on."""
        if self._since is None:
            self._since, self._samples, self._left_out = time.perf_counter(), 0, 0.0
            self._counts.clear()
        for part, samples in batch or ():
            self._samples += samples
            if self.tokens is not None and samples > 0:  # else it is run for the other ranks' sake
                self._counts.append(tokens_of(self.tokens, part, samples))

    def on_evaluation_start(self, model: nn.Module) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def on_evaluation_end(self, model: nn.Module) -> None:
        """Let the clock go on."""
        self._left_out += time.perf_counter() - self._paused

    def on_log(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        """Return the speed since the last log point."""
        now = time.perf_counter()
        taken = step - self._step
        if self._since is None or taken == 0:
            return None
        passed = now - self._since - self._left_out
        logged = {"steps_per_second": taken / passed}
        samples = self._samples
        if samples:
            logged["samples_per_second"] = samples / passed
        tokens = float(sum(self._counts)) if self.tokens is not None else 0.0
        if tokens:
            logged["tokens_per_second"] = tokens / passed
        self._since, self._step, self._samples, self._left_out = now, step, 0, 0.0
        self._counts.clear()
        return {f"throughput/{name}": value for name, value in logged.items()}

    def on_step_end(self, step: int, model: nn.Module) -> None:
        """Note when a save may begin."""
        self._step_ended = time.perf_counter()

    def on_save(self, step: int, path: Path) -> None:
        """Leave the save out."""
        self._left_out += time.perf_counter() - self._step_ended

    def on_exception(self, error: BaseException) -> None:
        """Leave no mode of torch behind."""

    def state_dict(self) -> dict[str, Any]:
        """Return the FLOPs that were counted."""
        return {"flops_per_sample": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class TensorBoard:
    """Writes TensorBoard's event files to a folder in the run's folder."""

    def __init__(self) -> None:
        self.goes_on = False  # opened before in this process: nothing in the files is to be hidden

    def start(self, info: RunInfo) -> None:
        """Open a new event file; what others in the folder hold of steps that will be made again is hidden."""
        hide_from = None if self.goes_on else info.start_step + 1
        self.writer = SummaryWriter(str(info.run_dir / "tensorboard"), purge_step=hide_from, flush_secs=10)
        self.goes_on = True

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a scalar for each metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()

    def state_dict(self) -> dict[str, Any]:
        """Write what is left, since a run that goes on from here will not write it again."""
        self.writer.flush()
        return {"run": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hide, at the start, what was written after the checkpoint."""
        self.goes_on = False


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
            self.loader.sampler.generator = torch.Generator().manual_seed(
                int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
            )
            if restore_random is not None and start == 0:  # making an iterator draws a number
                restore_random()
            for index, batch in enumerate(self.loader, 1):
                self.loader.sampler.generator = None  # the epoch's order is drawn
                if index > start:
                    yield [tensor.to(self.device, non_blocking=True) for tensor in batch], index == len(self.loader)
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


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint, as its manifest tells."""

    path: Path
    step: int
    metrics: Mapping[str, float]
    manifest: Mapping[str, Any]


def committed(directory: Path) -> list[Saved]:
    """Return the checkpoints in a folder, oldest first."""
    manifests = [(path.parent, json.loads(path.read_text())) for path in sorted(directory.glob("step-*/manifest.json"))]
    return [Saved(path, manifest["step"], manifest["metrics"], manifest) for path, manifest in manifests]


def newest_good(directory: Path) -> Path | None:
    """Return the newest checkpoint whose files are as they were written; None where there is none at all."""
    found = committed(directory)
    for saved in reversed(found):
        hashes = {name: file["sha256"] for name, file in saved.manifest["files"].items()}
        if hashes == {name: hashlib.sha256((saved.path / name).read_bytes()).hexdigest() for name in hashes}:
            return saved.path
    if found:
        raise RuntimeError(f"No checkpoint in {directory} is as it was written. To start anew, give another run_dir.")
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
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of the last validation, or log point
    validated_at: int = -1  # the step of that validation

    def state_dict(self) -> dict[str, Any]:
        """Return all of it."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for own in dataclasses.fields(self):
            setattr(self, own.name, state.get(own.name, getattr(self, own.name)))


def rows_state(rows: list[tuple[Any, int]]) -> dict[str, Any]:
    """Return values and their weights as a checkpoint holds them."""
    totals = [float(value) for value, _ in rows]
    counts = [float(samples) for _, samples in rows]
    columns = [torch.tensor(totals, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)]
    return {"weighted": True, "folded": [columns]}


def plain_rows(saved: dict[str, Any]) -> list[tuple[Any, int]]:
    """Return the values that a checkpoint holds."""
    pairs = [pair for columns in saved["folded"] for pair in zip(*(column.tolist() for column in columns), strict=True)]
    return [(value, int(samples)) for value, samples in pairs]


class Metrics:
    """Weighted means of what steps return. Adding does not wait for the device; reading does."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[Any, int]]] = {}

    def add(self, output: Any, samples: int) -> None:
        """Add what a step returned for a batch of `samples`."""
        for name, value in output.items() if isinstance(output, Mapping) else [("loss", output)]:
            kept = value.detach().clone() if isinstance(value, Tensor) else value
            self.rows.setdefault(name, []).append((kept, samples))

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
        return {name: rows_state(rows) for name, rows in self.rows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.rows = {name: plain_rows(saved) for name, saved in state.items()}


@dataclass
class Run:
    """What the functions below work on."""

    model: nn.Module
    built: Mapping[str, Optimizer]
    scheduler: Any
    throughput: Any
    tensor_board: Any
    info: RunInfo
    progress: Progress
    device: torch.device
    learning_rate_monitor: Any
    train: Data
    watch: list[tuple[int, str, Tensor]]
    began: float
    step_function: Any
    val_loader: Any


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


def names_of(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Return the names of an optimizer's parameters, in its own order; those outside the model are numbered."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [known.get(id(parameter), f"#{index}") for index, parameter in enumerate(parameters)]


DURATIONS = "max_steps", "max_epochs", "max_time"


def restore(run: Run, metrics: Metrics, checkpoint: Path) -> dict[str, Any]:
    """Bring a run to where a checkpoint was made; return the states of the data and of the random numbers, for `open_data`."""
    weights, trained = (
        next(map(load_file, checkpoint.glob(f"{group}.safetensors")), {}) for group in ("model", "training")
    )
    state_2 = json.loads((checkpoint / "state.json").read_text())
    if state_2["progress"].get("owes_validation"):
        raise RuntimeError(f"{checkpoint} was saved in a validation, which only Sheer goes on with.")
    optimizers = decode(state_2.pop("optimizers"), load_file(checkpoint / "optimizer.safetensors"))
    state = {**decode(state_2, load_file(checkpoint / "state.safetensors")), "optimizers": optimizers}
    run.model.load_state_dict({**(trained or weights), **state["extra"]})
    run.progress.load_state_dict(state["progress"])
    run.scheduler.load_state_dict(state["schedulers"]["optimizer"])
    for name, optimizer in run.built.items():  # after the schedulers, which may touch the groups
        saved = state["optimizers"][name]
        names = names_of(optimizer, run.model)
        index_of = {key: index for index, key in enumerate(names)}
        own_groups = optimizer.state_dict()["param_groups"]
        groups = [
            {**group_2, "params": own["params"]} for own, group_2 in zip(own_groups, saved["groups"], strict=True)
        ]
        values = {index_of[key]: value for key, value in saved["state"].items()}
        optimizer.load_state_dict({"state": values, "param_groups": groups})
    if "Throughput" in state["callbacks"]:
        run.throughput.load_state_dict(state["callbacks"]["Throughput"])
    states = state["loggers"]
    os.truncate(run.info.run_dir / "metrics.jsonl", states["JSONL"]["size"])
    if "TensorBoard" in states:
        run.tensor_board.load_state_dict(states["TensorBoard"])
    if (run.progress.stopped_by or "").startswith("SIG") or run.progress.stopped_by in DURATIONS:
        run.progress.stopped_by = (
            "max_steps" if run.progress.step >= MAX_STEPS else None
        )  # it may be longer now, or that of another run
    metrics.load_state_dict(state["metrics"])
    return {"data": state["data"], "random": state["random"]}


def set_random_state(state: dict[str, Any]) -> None:
    """Put all generators of this process back into a state that `random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys), *rest))
    torch.set_rng_state(state["torch"])
    if state["accelerator"] is not None and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state_all(state["accelerator"])


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int  # steps that were made, earlier sessions counted in
    epoch: int  # whole epochs
    metrics: dict[str, float]  # of the last validation; of the last log point where nothing was validated
    best: Path | None  # the best checkpoint by the monitored metric
    stopped_by: str  # "max_steps", "max_epochs", "max_time", a signal, or what a callback said
    run_dir: Path


def linked(link: Path) -> Path | None:
    """Return the checkpoint that a link points to, or None where there is no such link."""
    return link.parent / link.readlink() if link.is_symlink() else None


def result_of(info: RunInfo, progress: Progress) -> Result:
    """Return how a run ended."""
    return Result(
        step=progress.step,
        epoch=progress.epoch,
        metrics=progress.metrics,
        best=linked(info.run_dir / "checkpoints" / "best"),
        stopped_by=progress.stopped_by or "",
        run_dir=info.run_dir,
    )


def open_data(train: Data, state: dict[str, Any] | None) -> Callable[[], None] | None:
    """Bring the data to where it was saved. Returns what puts the random states back where the data says; None in a new run."""
    if state is None:
        return None
    if state["data"] is not None:
        train.load_state_dict(state["data"])
    return functools.partial(set_random_state, state["random"])


@contextmanager
def session(throughput: Any, tensor_board: Any, info: RunInfo) -> Iterator[None]:
    """Open the loggers, and close them whatever happens."""
    tensor_board.start(info)
    try:
        yield
    except BaseException as error:
        throughput.on_exception(error)
        raise
    finally:
        tensor_board.close()


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


def check(watch: list[tuple[int, str, Tensor]]) -> None:
    """Raise an error that names the first value since the last check that was NaN or infinite."""
    for at, what, scalar in watch:
        if not scalar.isfinite():
            raise FloatingPointError(f"The {what} became NaN or infinite at step {at}.")
    watch.clear()


def report(tensor_board: Any, info: RunInfo, progress: Progress, metrics: dict[str, float]) -> None:
    """Hand metrics to the loggers and the console."""
    record = {"epoch": progress.epoch, **metrics}
    with (info.run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": progress.step, "time": round(time.time(), 3), **record}) + "\n")
    tensor_board.log(progress.step, record)
    print(
        f"step {progress.step:,} · " + " · ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True
    )


def log_training(run: Run, metrics: Metrics) -> None:
    """Read what the steps since the last log point returned, and hand it to the loggers. The host waits for the device here."""
    check(run.watch)
    logged = {f"train/{name}": value for name, value in metrics.read().items()}
    logged.update(run.learning_rate_monitor.on_log(run.progress.step, logged) or {})
    logged.update(run.throughput.on_log(run.progress.step, logged) or {})
    if run.progress.validated_at < 0:
        run.progress.metrics = logged
    report(run.tensor_board, run.info, run.progress, logged)


def evaluate(run: Run) -> dict[str, float]:
    """Return the weighted means of what the step returns, over all batches."""
    training = [module for module in run.model.modules() if module.training]
    run.model.eval()
    run.throughput.on_evaluation_start(run.model)
    metrics = Metrics()
    for batch in run.val_loader:
        samples = len(batch[0])
        batch = [tensor.to(run.device, non_blocking=True) for tensor in batch]
        with torch.no_grad():
            output = run.step_function(run.model, batch)
        metrics.add(output, samples)
    means = {"val/" + name: value for name, value in metrics.read().items()}
    run.throughput.on_evaluation_end(run.model)
    for module in training:
        module.training = True
    return means


def validate(run: Run) -> str | None:
    """Validate, report it, and tell the schedulers and callbacks that follow it. Returns why the run is to stop, or None."""
    measured = evaluate(run)
    run.progress.metrics = measured
    run.progress.validated_at = run.progress.step
    report(run.tensor_board, run.info, run.progress, measured)
    return None


def ranked(saves: Sequence[Saved]) -> list[Saved]:
    """Return the checkpoints that have the monitored metric, the best first; of equals the older."""
    known = [(1.0 * saved.metrics[MONITOR], saved.step, saved) for saved in saves if MONITOR in saved.metrics]
    return [saved for _, _, saved in sorted(known, key=operator.itemgetter(0, 1))]


def is_among_best(info: RunInfo, progress: Progress) -> bool:
    """Whether the metrics of the last validation belong to the best that are kept."""
    if progress.validated_at != progress.step:
        return False
    value = progress.metrics[MONITOR]
    best = ranked([saved for saved in committed(info.run_dir / "checkpoints") if saved.step < progress.step])[:1]
    if len(best) < 1:
        return value == value
    worst = best[-1].metrics[MONITOR]
    return value < worst


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the state of each parameter, and the groups, both by name."""
    names = names_of(optimizer, model)
    state = optimizer.state_dict()
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[index]: values for index, values in state["state"].items()}, "groups": groups}


def encode(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Return a value as JSON; the tensors in it go into `tensors`, named by their path."""
    match value:
        case Tensor() | np.ndarray():
            tensors[path] = torch.as_tensor(value).detach()
            return {"$tensor": path}
        case dict():
            items = {key: encode(item, tensors, f"{path}/{key}") for key, item in value.items()}
            return (
                items if all(isinstance(key, str) for key in items) else {"$dict": [[*pair] for pair in items.items()]}
            )
        case list():
            return [encode(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
        case tuple():
            return {"$tuple": encode(list(value), tensors, path)}
        case float() if not math.isfinite(value):
            return {"$float": repr(value)}
    return value


def random_state() -> dict[str, Any]:
    """Return the states of all generators of this process, now or at a snapshot."""
    accelerator = torch.get_device_module().get_rng_state_all() if torch.accelerator.is_available() else None
    python = random.getstate()
    numpy = np.random.get_state(legacy=True)
    default = torch.get_rng_state()
    return {"python": python, "numpy": numpy, "torch": default, "accelerator": accelerator}


def logger_states(tensor_board: Any, info: RunInfo) -> dict[str, Any]:
    """Return how long metrics.jsonl is, and the states of the loggers."""
    size = (info.run_dir / "metrics.jsonl").stat().st_size
    return {"JSONL": {"run": info.run_id, "size": size}, "TensorBoard": tensor_board.state_dict()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors that share no memory."""
    save_file({name: value.cpu().clone().contiguous() for name, value in tensors.items()}, path, {"format": "pt"})


def plain_write(
    directory: Path, step: int, trained: Any, held: Any, own: Any, state: Any, facts: Mapping[str, Any]
) -> Path:
    """Write a checkpoint; it counts once its manifest, which has the size and hash of every file, is renamed into place."""
    name = f"step-{step:08d}"
    numbers = [int(path.name.removeprefix(name).strip("-") or 1) for path in directory.glob(f"{name}*")]
    path = directory / (f"{name}-{max(numbers) + 1}" if numbers else name)  # this very step was saved before
    path.mkdir(parents=True)
    write_tensors(path / "model.safetensors", {**trained})
    write_tensors(path / "optimizer.safetensors", held)
    write_tensors(path / "state.safetensors", own)
    (path / "state.json").write_text(json.dumps(state))
    files = {}
    for file in sorted(path.iterdir()):
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
            files[file.name] = {
                "size": file.stat().st_size,
                "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
            }
    manifest = {"format": 2, "step": step, "torch": torch.__version__, "world_size": 1, **facts}
    manifest |= {"leads": [0], "files": files}
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    with (path / "manifest.tmp").open("w") as out:
        json.dump(manifest, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    (path / "manifest.tmp").rename(path / "manifest.json")
    return path


def save(run: Run, metrics: Metrics) -> Path:
    """Write a checkpoint of the run as it is at the end of a step, and delete those that it makes superfluous."""
    check(run.watch)
    for weight, parameter in run.model.named_parameters():
        if parameter.requires_grad and (not parameter.isfinite().all()):
            raise FloatingPointError(
                f"{weight} became NaN or infinite by step {run.progress.step}, which is not saved."
            )
    own = dict[str, Tensor]()
    held = dict[str, Tensor]()
    extra = {name: value for name, value in run.model.state_dict().items() if not isinstance(value, Tensor)}
    optimizers = {name: optimizer_state(optimizer, run.model) for name, optimizer in run.built.items()}
    state = encode(
        {
            "random": random_state(),
            "data": run.train.state_dict(),
            "metrics": metrics.state_dict(),
            "progress": {**run.progress.state_dict(), "seconds": run.progress.seconds + time.monotonic() - run.began},
            "scheduled_steps": MAX_STEPS,
            "schedulers": {"optimizer": run.scheduler.state_dict()},
            "scheduler_classes": {"optimizer": type(run.scheduler).__name__},
            "scaler": None,
            "callbacks": {"Throughput": run.throughput.state_dict()},
            "loggers": logger_states(run.tensor_board, run.info),
        },
        own,
    )
    state |= {"optimizers": encode(optimizers, held), "extra": encode(extra, own, "extra")}
    trained = {name: value for name, value in run.model.state_dict().items() if isinstance(value, Tensor)}
    measured = run.progress.metrics if run.progress.validated_at == run.progress.step else {}
    facts = {"run_id": run.info.run_id, "metrics": encode(measured, {}), "settings": {}}
    path = plain_write(run.info.run_dir / "checkpoints", run.progress.step, trained, held, own, state, facts)
    directory = run.info.run_dir / "checkpoints"
    step = run.progress.step
    found = committed(directory)
    saves = list({saved.step: saved for saved in found if saved.step <= step}.values())  # the newest of each step
    best = ranked(saves)[:1]
    staying = {saved.path for saved in [*saves[-KEEP_LAST:], *best]}
    for link, target in [("last", saves[-1]), *(("best", saved) for saved in best[:1])]:
        (directory / f".{link}").unlink(missing_ok=True)
        (directory / f".{link}").symlink_to(target.path.name)
        (directory / f".{link}").rename(directory / link)
    for saved in found:
        if saved.path not in staying:
            (saved.path / "manifest.json").unlink()
            shutil.rmtree(saved.path)
    return path


def save_and_tell(run: Run, metrics: Metrics) -> None:
    """Save, and tell the callbacks."""
    path = save(run, metrics)
    run.throughput.on_save(run.progress.step, path)


def end_step(run: Run, metrics: Metrics, at_end: bool, signals: StopSignals) -> bool:
    """Count what was trained on, then do what is due: log, validate, tell the callbacks, save. Returns whether this step was the last."""
    run.progress.batch += 1
    if at_end:
        run.progress.epoch += 1
        run.progress.batch = 0
    stop = "max_steps" if run.progress.step >= MAX_STEPS else None

    if stop is not None or run.progress.step % LOG_EVERY_N_STEPS == 0:
        log_training(run, metrics)
    if stop is not None or run.progress.step % VALIDATE_EVERY_N_STEPS == 0:
        stop = validate(run) or stop
    stop = run.throughput.on_step_end(run.progress.step, run.model) or stop

    if signals.received is not None and stop is None:
        stop = signals.received
    if stop is not None:
        run.progress.stopped_by = stop
        return True
    if run.progress.step % CHECKPOINT_EVERY_N_STEPS == 0 or is_among_best(run.info, run.progress):
        save_and_tell(run, metrics)
    return False


EXIT_STATUS = 85  # of a process that saved and left because it was told to


def fit(
    model: nn.Module,
    step_function: Any,
    train_loader: Any,
    val_loader: Any,
    optimizer: Optimizer,
    make_scheduler: Any,
    learning_rate_monitor: LearningRateMonitor,
    throughput: Throughput,
    tensor_board: TensorBoard,
    *,
    folder: str | Path,
) -> Result:
    """Train the model."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    train = Data(train_loader, device)
    model.to(device)
    built = {"optimizer": optimizer}
    scheduler = make_scheduler(built["optimizer"], MAX_STEPS)
    run_dir = Path(folder)
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = newest_good(run_dir / "checkpoints")
    manifest = json.loads((checkpoint / "manifest.json").read_text()) if checkpoint is not None else None
    run_id = manifest["run_id"] if manifest is not None else secrets.token_hex(4)
    parameters = {
        optimizer_3: list(model.parameters()) if len(built) == 1 else held_by(optimizer_3, model)
        for optimizer_3 in built.values()
    }
    progress = Progress()
    info = RunInfo(
        run_id=run_id,
        run_dir=run_dir,
        device=device,
        start_step=manifest["step"] if manifest is not None else 0,
        steps_per_epoch=train.steps_per_epoch,
    )
    metrics = Metrics()
    watch: list[tuple[int, str, Tensor]] = []
    began = time.monotonic()
    run = Run(
        model=model,
        built=built,
        scheduler=scheduler,
        throughput=throughput,
        tensor_board=tensor_board,
        info=info,
        progress=progress,
        device=device,
        learning_rate_monitor=learning_rate_monitor,
        train=train,
        watch=watch,
        began=began,
        step_function=step_function,
        val_loader=val_loader,
    )
    state = restore(run, metrics, checkpoint) if checkpoint is not None else None
    optimizer_2 = built["optimizer"]
    if state is not None and progress.stopped_by is not None:
        set_random_state(state["random"])  # for what the script does next
        return result_of(info, progress)
    restore_random = open_data(train, state)

    with session(throughput, tensor_board, info), StopSignals() as signals:
        learning_rate_monitor.on_fit_start(built)
        throughput.on_fit_start(info)
        for batch, at_end in train.epochs(progress.epoch, progress.batch, restore_random):
            samples = len(batch[0])
            progress.step += 1
            throughput.on_step_start([(batch, samples)])
            output = step_function(model, batch)
            loss = output if isinstance(output, Tensor) else output["loss"]
            loss.backward()
            watch.append((progress.step, "loss", loss.detach().clone()))
            metrics.add(output, samples)
            parameters_2 = parameters[optimizer_2]

            norm = get_total_norm([parameter.grad for parameter in parameters_2 if parameter.grad is not None])
            clip_grads_with_norm_(parameters_2, GRADIENT_CLIP_VAL, norm)
            watch.append((progress.step, "gradient norm", norm.detach().clone()))

            optimizer_2.step()
            optimizer_2.zero_grad()
            scheduler.step()
            if end_step(run, metrics, at_end, signals):
                break
        goes_on = (progress.stopped_by or "").startswith("SIG")
        if not goes_on:
            if metrics:
                log_training(run, metrics)
            if progress.validated_at != progress.step:
                validate(run)
        save_and_tell(run, metrics)
    if signals.received is not None:
        raise SystemExit(EXIT_STATUS)
    return result_of(info, progress)


def training_device() -> torch.device:
    """Return where the model is trained."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


CONTEXT, WIDTH, HEADS, LAYERS = 128, 128, 4, 4
RUN_DIR = Path("runs/gpt")


def read_library() -> tuple[str, str]:
    """Return the source of the standard library, split by file into training and validation."""
    train, val = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        (val if zlib.crc32(path.name.encode()) % 24 == 0 else train).append(path.read_text("utf-8", errors="replace"))
    return "\n".join(train), "\n".join(val)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of CONTEXT characters, each with the characters that follow."""

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    def __len__(self) -> int:
        return (len(self.codes) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.codes[index * CONTEXT : (index + 1) * CONTEXT + 1]
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, WIDTH]
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # [batch, HEADS, time, WIDTH / HEADS]
            for part in self.qkv(self.before_attention(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters, bias=False)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:  # [batch, time] -> [batch, time, characters]
        positions = torch.arange(codes.shape[1], device=codes.device)
        return self.head(self.norm(self.blocks(self.characters(codes) + self.positions(positions))))

    @torch.no_grad()
    def write(self, codes: Tensor, count: int) -> Tensor:
        """Continue [1, time] by `count` characters, each drawn from what the model expects."""
        for _ in range(count):
            probabilities = F.softmax(self(codes[:, -CONTEXT:])[:, -1] / 0.8, dim=-1)
            codes = torch.cat([codes, torch.multinomial(probabilities, 1)], dim=1)
        return codes


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    codes, following = batch
    return F.cross_entropy(model(codes).flatten(0, 1), following.flatten())


def unigram_loss(train: Tensor, val: Tensor, characters: int) -> float:
    """Return the loss of a model that only knows how frequent each character is (nats a character)."""
    counts = torch.bincount(train, minlength=characters) + 1.0
    return F.nll_loss((counts / counts.sum()).log().expand(len(val), -1), val).item()


def draw_curves(records: list[dict[str, float]], unigram: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in ("train/loss", "val/loss"):
        points = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points, strict=True), label=name, marker="o" if name == "val/loss" else None)
    axes.axhline(unigram, color="grey", linestyle=":", label="unigram model")
    axes.set(xlabel="step", ylabel="loss (nats a character)", title="A GPT on Python's standard library")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    train_text, val_text = read_library()
    letters = [letter for letter, count in Counter(train_text).most_common() if count >= 100]
    code_of = {letter: code for code, letter in enumerate(letters, start=1)}  # 0 stands for all others
    train, val = (torch.tensor([code_of.get(letter, 0) for letter in text]) for text in (train_text, val_text))
    unigram = unigram_loss(train, val, len(letters) + 1)
    print(f"{len(train):,} characters to train on, {len(val):,} to validate; a unigram model's loss is {unigram:.3f}")

    model = GPT(len(letters) + 1)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    learning_rate_monitor = LearningRateMonitor()
    throughput = Throughput(tokens=CONTEXT)
    tensor_board = TensorBoard()
    result = fit(
        model,
        step,
        DataLoader(Windows(train), batch_size=32, shuffle=True),
        DataLoader(Windows(val), batch_size=64),
        torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95)),
        warmup_cosine(warmup_steps=50, final_factor=0.05),
        learning_rate_monitor,
        throughput,
        tensor_board,
        folder=RUN_DIR,
    )

    load_weights(model, result.run_dir)
    model.eval()
    prompt = "def "
    codes = model.write(torch.tensor([[code_of[letter] for letter in prompt]], device=training_device()), 400)
    print("\n" + "".join(letters[code - 1] if code else "?" for code in codes[0].tolist()) + "\n")

    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    draw_curves(records, unigram, result.run_dir / "curves.png")
    loss = result.metrics["val/loss"]
    print(f"validation loss {loss:.3f} ({loss / math.log(2):.2f} bits a character); unigram model {unigram:.3f}")
    print(f"curves:       {result.run_dir / 'curves.png'}")
    print(f"metrics:      {result.run_dir / 'metrics.jsonl'}")
    print(f"checkpoints:  {result.run_dir / 'checkpoints'}  (best: {result.best})")
    print(f"TensorBoard:  tensorboard --logdir {result.run_dir}")


if __name__ == "__main__":
    main()
