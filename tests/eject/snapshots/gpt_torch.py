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

import functools
import hashlib
import itertools
import numpy as np
import os
import random
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
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
DURATIONS = "max_steps", "max_epochs", "max_time"
EXIT_STATUS = 85  # of a process that saved and left because it was told to


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

    def on_log(self) -> Mapping[str, float] | None:
        """Return the values of all groups."""
        logged: dict[str, float] = {}
        for label, optimizer in self._optimizers.items():
            groups = optimizer.param_groups
            for index, group in enumerate(groups):
                place = f"/{label}" if len(self._optimizers) > 1 else ""
                place += f"/{group.get('name', index)}" if len(groups) > 1 else ""
                logged[f"lr{place}"] = float(group["lr"])
        return logged


def tokens_of(tokens: int | str | Callable[[Any], int | Tensor], batch: Any, samples: int) -> int | Tensor:
    """Count the tokens of a batch, as `Throughput` is told to."""
    if isinstance(tokens, int):
        return tokens * samples
    if isinstance(tokens, str):
        return int(batch[tokens].numel())
    counted_tokens = tokens(batch)
    return counted_tokens.detach() if isinstance(counted_tokens, Tensor) else counted_tokens


class Throughput:
    """Logs the speed since the last log point; the time of validations and saves is left out."""

    def __init__(self, *, tokens: int | str | Callable[[Any], int | Tensor] | None = None) -> None:
        self.tokens = tokens
        self._samples, self._step = 0, 0
        self._counts: list[int | Tensor] = []
        self._since: float | None = None
        self._left_out = self._paused = self._step_ended = 0.0

    def on_fit_start(self, start_step: int) -> None:
        """Find out the peak."""
        self._step, self._since = start_step, None

    def on_step_start(self, batch: Any) -> None:
        """Count what the step trains on."""
        if self._since is None:
            self._since, self._samples, self._left_out = time.perf_counter(), 0, 0.0
            self._counts.clear()
        for part, samples in batch or ():
            self._samples += samples
            if self.tokens is not None and samples > 0:  # else it is run for the other ranks' sake
                self._counts.append(tokens_of(self.tokens, part, samples))

    def on_evaluation_start(self) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def on_evaluation_end(self) -> None:
        """Let the clock go on."""
        self._left_out += time.perf_counter() - self._paused

    def on_log(self, step: int) -> Mapping[str, float] | None:
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

    def on_step_end(self) -> None:
        """Note when a save may begin."""
        self._step_ended = time.perf_counter()

    def on_save(self) -> None:
        """Leave the save out."""
        self._left_out += time.perf_counter() - self._step_ended

    def state_dict(self) -> dict[str, Any]:
        """Return the FLOPs that were counted."""
        return {"flops_per_sample": None}

    def load_state_dict(self) -> None:
        """Take back what `state_dict` returned."""


class TensorBoard:
    """Writes TensorBoard's event files to a folder in the run's folder."""

    def start(self, run_dir: Path, start_step: int) -> None:
        """Open a new event file; what others in the folder hold of steps that will be made again is hidden."""
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1, flush_secs=10)

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


class Data:
    """The batches of epoch after epoch, from any position on; the order of an epoch depends on the seed and its number alone."""

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self.seed = torch.initial_seed()

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


def committed(directory: Path) -> dict[Path, Any]:
    """Return the checkpoints in a folder, oldest first, each with its manifest."""
    return {path.parent: json.loads(path.read_text()) for path in sorted(directory.glob("step-*/manifest.json"))}


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest_good(directory: Path) -> Path | None:
    """Return the newest checkpoint whose files are as they were written; None where there is none at all."""
    found = committed(directory)
    for path, manifest in reversed(found.items()):
        files = manifest["files"].items()
        if all((path / name).is_file() and sha256(path / name) == file["sha256"] for name, file in files):
            return path
    if found:
        raise RuntimeError(f"No checkpoint in {directory} is as it was written. To start anew, give another run_dir.")
    (directory.parent / "metrics.jsonl").write_text("")  # of a run that was killed before its first save
    return None


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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `asdict` returned."""
        for own in fields(self):
            setattr(self, own.name, state.get(own.name, getattr(self, own.name)))


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


@dataclass
class Run:
    """What the functions below work on."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any
    run_dir: Path
    throughput: Throughput
    tensor_board: TensorBoard
    run_id: str
    progress: Progress = field(default_factory=Progress)
    metrics: Metrics = field(default_factory=Metrics)
    watch: list[tuple[int, str, Tensor]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)


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
    run.scheduler.load_state_dict(state["schedulers"]["optimizer"])
    saved = state["optimizers"]["optimizer"]
    names = names_of(run.optimizer, run.model)
    index_of = {key: index for index, key in enumerate(names)}
    own_groups = run.optimizer.state_dict()["param_groups"]
    groups = [{**of_saved, "params": own["params"]} for own, of_saved in zip(own_groups, saved["groups"], strict=True)]
    values = {index_of[key]: value for key, value in saved["state"].items()}
    run.optimizer.load_state_dict({"state": values, "param_groups": groups})
    os.truncate(run.run_dir / "metrics.jsonl", state["loggers"]["JSONL"]["size"])
    if (run.progress.stopped_by or "").startswith("SIG") or run.progress.stopped_by in DURATIONS:
        run.progress.stopped_by = "max_steps" if run.progress.step >= MAX_STEPS else None  # it may be longer now
    run.metrics.load_state_dict(state["metrics"])
    return {"data": state["data"], "random": state["random"]}


def set_random_state(state: dict[str, Any]) -> None:
    """Put all generators of this process back into a state that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["accelerator"] is not None and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state_all(state["accelerator"])


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    metrics: dict[str, float]  # of the last validation; of the last log point where nothing was validated
    best: Path | None  # the best checkpoint by the monitored metric
    run_dir: Path


def result_of(run_dir: Path, progress: Progress) -> Result:
    """Return how a run ended."""
    link = run_dir / "checkpoints" / "best"
    best = link.parent / link.readlink() if link.is_symlink() else None
    return Result(metrics=progress.metrics, best=best, run_dir=run_dir)


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


def check(watched: list[tuple[int, str, Tensor]]) -> None:
    """Raise an error that names the first value since the last check that was NaN or infinite."""
    for at, what, scalar in watched:
        if not scalar.isfinite():
            raise FloatingPointError(f"The {what} became NaN or infinite at step {at}.")
    watched.clear()


def report(tensor_board: TensorBoard, run_dir: Path, progress: Progress, measured: dict[str, float]) -> None:
    """Hand metrics to the loggers and the console."""
    record = {"epoch": progress.epoch, **measured}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": progress.step, "time": round(time.time(), 3), **record}) + "\n")
    tensor_board.log(progress.step, record)
    print(
        f"step {progress.step:,}", *(f"{name} {value:.4g}" for name, value in measured.items()), sep=" · ", flush=True
    )


def evaluate(
    model: nn.Module, step_function: Any, loaders: Any, device: torch.device, throughput: Throughput
) -> dict[str, float]:
    """Return the weighted means of what the step returns, over all batches."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    throughput.on_evaluation_start()
    metrics = Metrics()
    for batch in loaders:
        samples = len(batch[0])
        batch = [tensor.to(device, non_blocking=True) for tensor in batch]
        with torch.no_grad():
            output = step_function(model, batch)
        metrics.add(output, samples)
    means = {"val/" + name: value for name, value in metrics.read().items()}
    throughput.on_evaluation_end()
    for module in training:
        module.training = True
    return means


def is_among_best(run_dir: Path, progress: Progress) -> bool:
    """Whether the metrics of a validation, right behind it, belong to the best that are kept."""
    value = progress.metrics[MONITOR]
    step = progress.step
    earlier = [m["metrics"].get(MONITOR) for m in committed(run_dir / "checkpoints").values() if m["step"] < step]
    others = [other for other in earlier if isinstance(other, (int, float))]
    as_good = [other for other in others if other <= value]
    return value == value and len(as_good) < 1


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


def plain_write(
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
    found = committed(directory)
    # The newest of each step; what is left of later ones will be made again.
    saves = {manifest["step"]: path for path, manifest in found.items() if manifest["step"] <= step}
    paths = list(saves.values())
    values = {path: found[path]["metrics"].get(MONITOR) for path in paths}
    rated = [path for path, value in values.items() if isinstance(value, (int, float))]
    best = sorted(rated, key=values.__getitem__)[:1]  # of equals the older
    staying = {*paths[-KEEP_LAST:], *best}
    for link, path in [("last", saves[step]), *(("best", path) for path in best[:1])]:
        (directory / f".{link}").unlink(missing_ok=True)
        (directory / f".{link}").symlink_to(path.name)
        (directory / f".{link}").rename(directory / link)
    for path in found.keys() - staying:
        (path / "manifest.json").unlink()
        shutil.rmtree(path)


def save(run: Run, data: Data) -> None:
    """Write a checkpoint of the run as it is at the end of a step, and delete those that it makes superfluous."""
    check(run.watch)
    for weight, parameter in run.model.named_parameters():
        if parameter.requires_grad and (not parameter.isfinite().all()):
            raise FloatingPointError(f"{weight} is NaN or infinite after step {run.progress.step}, which is not saved.")
    own = dict[str, Tensor]()
    held = dict[str, Tensor]()
    names = names_of(run.optimizer, run.model)
    kept = run.optimizer.state_dict()
    named_groups = [{**group, "params": [names[index] for index in group["params"]]} for group in kept["param_groups"]]
    optimizers = {
        "optimizer": {
            "state": {names[index]: values for index, values in kept["state"].items()},
            "groups": named_groups,
        }
    }
    state = encode(
        {
            "random": random_state(),
            "data": data.state_dict(),
            "metrics": run.metrics.state_dict(),
            "progress": {**asdict(run.progress), "seconds": run.progress.seconds + time.monotonic() - run.began},
            "scheduled_steps": MAX_STEPS,
            "schedulers": {"optimizer": run.scheduler.state_dict()},
            "scheduler_classes": {"optimizer": type(run.scheduler).__name__},
            "scaler": None,
            "callbacks": {"Throughput": run.throughput.state_dict()},
            "loggers": {
                "JSONL": {"run": run.run_id, "size": (run.run_dir / "metrics.jsonl").stat().st_size},
                "TensorBoard": run.tensor_board.state_dict(),
            },
        },
        own,
    )
    state |= {"optimizers": encode(optimizers, held), "extra": {}}
    groups = {"model": run.model.state_dict(), "optimizer": held, "state": own}
    measured = run.progress.metrics if run.progress.validated_at == run.progress.step else {}
    plain_write(run.run_dir / "checkpoints", run.progress.step, groups, state, run.run_id, encode(measured, {}))
    prune(run.run_dir / "checkpoints", run.progress.step)


def save_and_tell(run: Run, data: Data) -> None:
    """Save, and tell the callbacks."""
    save(run, data)
    run.throughput.on_save()


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
    scheduler = make_scheduler(optimizer, MAX_STEPS)
    run_dir = Path(folder)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").touch()  # a checkpoint notes how long it is
    checkpoint = newest_good(run_dir / "checkpoints")
    manifest = json.loads((checkpoint / "manifest.json").read_text()) if checkpoint is not None else None
    run_id = manifest["run_id"] if manifest is not None else secrets.token_hex(4)
    run = Run(model, optimizer, scheduler, run_dir, throughput, tensor_board, run_id)
    parameters = list(model.parameters())
    start_step = manifest["step"] if manifest is not None else 0
    state = restore(run, checkpoint) if checkpoint is not None else None
    if state is not None and run.progress.stopped_by is not None:
        set_random_state(state["random"])  # for what the script does next
        return result_of(run_dir, run.progress)
    if state is not None:
        train.load_state_dict(state["data"])
    restore_random = functools.partial(set_random_state, state["random"]) if state is not None else None

    tensor_board.start(run_dir, start_step)
    with closing(tensor_board), StopSignals() as signals:
        learning_rate_monitor.on_fit_start({"optimizer": optimizer})
        throughput.on_fit_start(start_step)
        for batch, at_end in train.epochs(run.progress.epoch, run.progress.batch, restore_random):
            samples = len(batch[0])
            run.progress.step += 1
            throughput.on_step_start([(batch, samples)])
            output = step_function(model, batch)
            loss = output if isinstance(output, Tensor) else output["loss"]
            loss.backward()
            run.watch.append((run.progress.step, "loss", loss.detach().clone()))
            run.metrics.add(output, samples)
            norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
            clip_grads_with_norm_(parameters, GRADIENT_CLIP_VAL, norm)
            run.watch.append((run.progress.step, "gradient norm", norm))

            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            run.progress.batch += 1
            if at_end:
                run.progress.epoch += 1
                run.progress.batch = 0
            stop = "max_steps" if run.progress.step >= MAX_STEPS else None

            if stop is not None or run.progress.step % LOG_EVERY_N_STEPS == 0:
                check(run.watch)
                logged = {f"train/{name}": value for name, value in run.metrics.read().items()}
                logged.update(learning_rate_monitor.on_log() or {})
                logged.update(throughput.on_log(run.progress.step) or {})
                if run.progress.validated_at < 0:
                    run.progress.metrics = logged
                report(tensor_board, run_dir, run.progress, logged)
            if stop is not None or run.progress.step % VALIDATE_EVERY_N_STEPS == 0:
                measured = evaluate(model, step_function, val_loader, device, throughput)
                run.progress.metrics = measured
                run.progress.validated_at = run.progress.step
                report(tensor_board, run_dir, run.progress, measured)
            throughput.on_step_end()

            if signals.received is not None and stop is None:
                stop = signals.received
            if stop is not None:
                run.progress.stopped_by = stop
                break
            if run.progress.step % CHECKPOINT_EVERY_N_STEPS == 0 or (
                run.progress.validated_at == run.progress.step and is_among_best(run_dir, run.progress)
            ):
                save_and_tell(run, train)
        save_and_tell(run, train)
    if signals.received is not None:
        raise SystemExit(EXIT_STATUS)
    return result_of(run_dir, run.progress)


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
