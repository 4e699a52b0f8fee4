"""Handwritten digits: trained, tested, and used without Sheer."""

# From `design.py`, by `sheer eject` 0.1.0 (Apache License 2.0), for one process (set parallel="ddp" or "fsdp" for several ranks); it is yours, to change as you like.
# Settings: max_epochs=10, precision='bf16-mixed', gradient_clip_val=1.0, monitor='val/accuracy', monitor_mode='max', checkpoint=Checkpoint(every_n_steps=100), run_dir='runs/digits', resume='auto'.

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import numpy as np
import operator
import os
import random
import secrets
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from typing import Any

MAX_EPOCHS = 10  # stop after this many passes over the training data
GRADIENT_CLIP_VAL = 1.0  # clip gradients to this norm, or to this absolute value
LOG_EVERY_N_STEPS = 50  # steps between two log points; the only points where the host waits for the device
MONITOR = "val/accuracy"  # the metric that says which checkpoint is best, such as "val/loss"
RUN_DIR = "runs/digits"  # the folder of the run; None: one named by the time, in runs/<script>
CHECKPOINT_EVERY_N_STEPS = 100  # save after every n-th step; None: not by steps
KEEP_LAST = 2  # how many of the newest checkpoints stay; with one, a damaged one has none before it


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a callback or logger is told at the start of a run."""

    run_id: str
    run_dir: Path
    device: torch.device
    start_step: int  # the steps that were done before: 0, or where the run goes on
    steps_per_epoch: int | None


class EarlyStopping:
    """Stops the run after `patience` validations in a row without an improvement of a metric."""

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience
        self.follows, self._sign = "", 1.0
        self._best, self._best_step, self._waited = math.inf, 0, 0

    def on_fit_start(self, info: RunInfo) -> None:
        """Find out which metric is followed."""
        if info.start_step == 0:
            self._best, self._best_step, self._waited = math.inf, 0, 0
        self.follows, self._sign = MONITOR, -1.0

    def on_validation_end(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Compare with the best value so far; return why the run is to stop, once it is."""
        value = metrics[self.follows]
        if math.isnan(value):
            warnings.warn(
                f"{self.follows} is NaN at step {step}, which EarlyStopping counts as no improvement.",
                UserWarning,
                stacklevel=2,
            )
        if self._sign * value < self._best - 0.0:
            self._best, self._best_step, self._waited = self._sign * value, step, 0
            return None
        self._waited += 1
        return (
            None
            if self._waited < self.patience
            else f"EarlyStopping: {self.follows} has not improved on {self._sign * self._best:.6g}, of step {self._best_step:,}, in {self._waited} validations"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far and what came after it."""
        return {"best": self._best, "best_step": self._best_step, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._best, self._best_step, self._waited = state["best"], state["best_step"], state["waited"]


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
        for name, value in output.items():
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
    optimizer: Any
    scheduler: Any
    early_stopping: Any
    tensor_board: Any
    info: RunInfo
    progress: Progress
    device: torch.device
    autocast: torch.autocast
    steps: int | None
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
    saved = state["optimizers"]["optimizer"]
    names = names_of(run.optimizer, run.model)
    index_of = {key: index for index, key in enumerate(names)}
    own_groups = run.optimizer.state_dict()["param_groups"]
    groups = [{**group_2, "params": own["params"]} for own, group_2 in zip(own_groups, saved["groups"], strict=True)]
    values = {index_of[key]: value for key, value in saved["state"].items()}
    run.optimizer.load_state_dict({"state": values, "param_groups": groups})
    if "EarlyStopping" in state["callbacks"]:
        run.early_stopping.load_state_dict(state["callbacks"]["EarlyStopping"])
    states = state["loggers"]
    os.truncate(run.info.run_dir / "metrics.jsonl", states["JSONL"]["size"])
    if "TensorBoard" in states:
        run.tensor_board.load_state_dict(states["TensorBoard"])
    if (run.progress.stopped_by or "").startswith("SIG") or run.progress.stopped_by in DURATIONS:
        run.progress.stopped_by = (
            "max_epochs" if run.progress.epoch >= MAX_EPOCHS else None
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
def session(tensor_board: Any, info: RunInfo) -> Iterator[None]:
    """Open the loggers, and close them whatever happens."""
    tensor_board.start(info)
    try:
        yield
    finally:
        tensor_board.close()


class StopSignals:
    """While entered, Ctrl-C and SIGTERM are remembered in `received`; the second leaves at once."""

    received: str | None = None

    def __enter__(self) -> "StopSignals":
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
    if run.progress.validated_at < 0:
        run.progress.metrics = logged
    report(run.tensor_board, run.info, run.progress, logged)


def evaluate(
    model: nn.Module, step_function: Any, loaders: Any, prefix: str, device: torch.device, autocast: torch.autocast
) -> dict[str, float]:
    """Return the weighted means of what the step returns, over all batches."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    metrics = Metrics()
    for batch in loaders:
        samples = len(batch[0])
        batch = [tensor.to(device, non_blocking=True) for tensor in batch]
        with torch.no_grad(), autocast:
            output = step_function(model, batch)
        metrics.add(output, samples)
    means = {prefix + name: value for name, value in metrics.read().items()}
    for module in training:
        module.training = True
    return means


def validate(run: Run) -> str | None:
    """Validate, report it, and tell the schedulers and callbacks that follow it. Returns why the run is to stop, or None."""
    measured = evaluate(run.model, run.step_function, run.val_loader, "val/", run.device, run.autocast)
    run.progress.metrics = measured
    run.progress.validated_at = run.progress.step
    report(run.tensor_board, run.info, run.progress, measured)
    return run.early_stopping.on_validation_end(run.progress.step, measured) or None


def ranked(saves: Sequence[Saved]) -> list[Saved]:
    """Return the checkpoints that have the monitored metric, the best first; of equals the older."""
    sign = -1.0
    known = [(sign * saved.metrics[MONITOR], saved.step, saved) for saved in saves if MONITOR in saved.metrics]
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
    return value > worst


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


def write(directory: Path, step: int, trained: Any, held: Any, own: Any, state: Any, facts: Mapping[str, Any]) -> Path:
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
    names = names_of(run.optimizer, run.model)
    state_2 = run.optimizer.state_dict()
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state_2["param_groups"]]
    optimizers = {
        "optimizer": {"state": {names[index]: values for index, values in state_2["state"].items()}, "groups": groups}
    }
    state = encode(
        {
            "random": random_state(),
            "data": run.train.state_dict(),
            "metrics": metrics.state_dict(),
            "progress": {**run.progress.state_dict(), "seconds": run.progress.seconds + time.monotonic() - run.began},
            "scheduled_steps": run.steps,
            "schedulers": {"optimizer": run.scheduler.state_dict()},
            "scheduler_classes": {"optimizer": type(run.scheduler).__name__},
            "scaler": None,
            "callbacks": {"EarlyStopping": run.early_stopping.state_dict()},
            "loggers": logger_states(run.tensor_board, run.info),
        },
        own,
    )
    state |= {"optimizers": encode(optimizers, held), "extra": encode(extra, own, "extra")}
    trained = {name: value for name, value in run.model.state_dict().items() if isinstance(value, Tensor)}
    measured = run.progress.metrics if run.progress.validated_at == run.progress.step else {}
    facts = {"run_id": run.info.run_id, "metrics": encode(measured, {}), "settings": {}}
    path = write(run.info.run_dir / "checkpoints", run.progress.step, trained, held, own, state, facts)
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


def end_step(run: Run, metrics: Metrics, at_end: bool, signals: StopSignals) -> bool:
    """Count what was trained on, then do what is due: log, validate, tell the callbacks, save. Returns whether this step was the last."""
    run.progress.batch += 1
    if at_end:
        run.progress.epoch += 1
        run.progress.batch = 0
    stop = "max_epochs" if run.progress.epoch >= MAX_EPOCHS else None

    if stop is not None or run.progress.step % LOG_EVERY_N_STEPS == 0:
        log_training(run, metrics)
    if stop is not None or at_end:
        stop = validate(run) or stop

    if signals.received is not None and stop is None:
        stop = signals.received
    if stop is not None:
        run.progress.stopped_by = stop
        return True
    if run.progress.step % CHECKPOINT_EVERY_N_STEPS == 0 or is_among_best(run.info, run.progress):
        save(run, metrics)
    return False


EXIT_STATUS = 85  # of a process that saved and left because it was told to


def fit(
    model: nn.Module,
    step_function: Any,
    train_loader: Any,
    val_loader: Any,
    optimizer: Optimizer,
    make_scheduler: Any,
    early_stopping: EarlyStopping,
    tensor_board: TensorBoard,
) -> tuple[Result, RunInfo]:
    """Train the model."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    train = Data(train_loader, device)
    model.to(device)
    steps = MAX_EPOCHS * train.steps_per_epoch
    scheduler = make_scheduler(optimizer, steps)
    run_dir = Path(RUN_DIR)
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = newest_good(run_dir / "checkpoints")
    manifest = json.loads((checkpoint / "manifest.json").read_text()) if checkpoint is not None else None
    run_id = manifest["run_id"] if manifest is not None else secrets.token_hex(4)
    parameters = list(model.parameters())
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
        optimizer=optimizer,
        scheduler=scheduler,
        early_stopping=early_stopping,
        tensor_board=tensor_board,
        info=info,
        progress=progress,
        device=device,
        autocast=autocast,
        steps=steps,
        train=train,
        watch=watch,
        began=began,
        step_function=step_function,
        val_loader=val_loader,
    )
    state = restore(run, metrics, checkpoint) if checkpoint is not None else None
    if state is not None and progress.stopped_by is not None:
        set_random_state(state["random"])  # for what the script does next
        return result_of(info, progress), info
    restore_random = open_data(train, state)

    with session(tensor_board, info), StopSignals() as signals:
        early_stopping.on_fit_start(info)
        for batch, at_end in train.epochs(progress.epoch, progress.batch, restore_random):
            progress.step += 1
            with autocast:
                output = step_function(model, batch)
            loss = output["loss"]
            loss.backward()
            watch.append((progress.step, "loss", loss.detach().clone()))
            metrics.add(output, len(batch[0]))

            norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
            clip_grads_with_norm_(parameters, GRADIENT_CLIP_VAL, norm)
            watch.append((progress.step, "gradient norm", norm.detach().clone()))

            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if end_step(run, metrics, at_end, signals):
                break
        goes_on = (progress.stopped_by or "").startswith("SIG")
        if not goes_on:
            if metrics:
                log_training(run, metrics)
            if progress.validated_at != progress.step:
                validate(run)
        save(run, metrics)
    if signals.received is not None:
        raise SystemExit(EXIT_STATUS)
    return result_of(info, progress), info


def test_metrics(
    model: nn.Module, step_function: Any, loader: Any, result: Result, info: RunInfo, tensor_board: Any
) -> dict[str, float]:
    """Return the means of what a step returns, over all batches of a loader."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    model.load_state_dict(load_file(result.run_dir / "checkpoints" / "best" / "model.safetensors"))
    model.to(device)
    metrics = evaluate(model, step_function, loader, "test/", device, autocast)
    with (result.run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": result.step, "time": round(time.time(), 3), **metrics}) + "\n")
    tensor_board.start(info)
    tensor_board.log(result.step, metrics)
    tensor_board.close()
    return metrics


random.seed(0)
np.random.seed(0)
torch.manual_seed(0)  # before anything random is built
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
train, val, test = random_split(data, [1297, 250, 250])
train_loader = DataLoader(train, batch_size=64, shuffle=True)  # 64 samples a step, on any number of ranks
val_loader, test_loader = DataLoader(val, batch_size=256), DataLoader(test, batch_size=256)

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


def scheduler(optimizer, total_steps):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=total_steps)


def step(model, batch):  # one function: trained on its "loss", evaluated on all it returns
    x, y = batch
    logits = model(x)
    return {"loss": F.cross_entropy(logits, y), "accuracy": (logits.argmax(-1) == y).float().mean()}


early_stopping = EarlyStopping(patience=3)
tensor_board = TensorBoard()
result, info = fit(model, step, train_loader, val_loader, optimizer, scheduler, early_stopping, tensor_board)
print(result.metrics)  # {"val/loss": ..., "val/accuracy": ...}
print(test_metrics(model, step, test_loader, result, info, tensor_board))  # {"test/loss": ..., "test/accuracy": ...}

model.load_state_dict(load_file(result.best / "model.safetensors"))  # all that serving needs
