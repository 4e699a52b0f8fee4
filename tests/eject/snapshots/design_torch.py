"""Handwritten digits: trained, tested, and used without Sheer."""

# From `design.py`, by `sheer eject` 0.1.0 (Apache License 2.0), for one process (set parallel="ddp" or "fsdp" for several ranks); it is yours, to change as you like.
# Settings: max_epochs=10, precision='bf16-mixed', gradient_clip_val=1.0, monitor='val/accuracy', monitor_mode='max', checkpoint=Checkpoint(every_n_steps=100), run_dir='runs/digits', resume='auto'.

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
import functools
import hashlib
import itertools
import json
import math
import numpy as np
import os
import random
import secrets
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
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
DURATIONS = "max_steps", "max_epochs", "max_time"
EXIT_STATUS = 85  # of a process that saved and left because it was told to


class EarlyStopping:
    """Stops the run after `patience` validations in a row without an improvement of a metric."""

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience
        self._best, self._best_step, self._waited = math.inf, 0, 0

    def on_validation_end(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Compare with the best value so far; return why the run is to stop, once it is."""
        value = metrics[MONITOR]
        if math.isnan(value):
            warnings.warn(f"{MONITOR} is NaN at step {step}: no improvement.", UserWarning, stacklevel=2)
        if -1.0 * value < self._best - 0.0:
            self._best, self._best_step, self._waited = -1.0 * value, step, 0
            return None
        self._waited += 1
        why = f"{MONITOR} has not improved on {-1.0 * self._best:.6g}, of step {self._best_step:,}, in {self._waited} validations"
        return f"EarlyStopping: {why}" if self._waited >= self.patience else None

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far and what came after it."""
        return {"best": self._best, "best_step": self._best_step, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._best, self._best_step, self._waited = state["best"], state["best_step"], state["waited"]


class TensorBoard:
    """Writes TensorBoard's event files to a folder in the run's folder."""

    def start(self, run_dir: Path, start_step: int) -> None:
        """Open a new event file; what others in the folder hold of steps that will be made again is hidden."""
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1, flush_secs=10)

    def start_again(self, run_dir: Path) -> None:
        """Open a new event file for what is measured after the run."""
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), flush_secs=10)

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
    early_stopping: EarlyStopping
    run_dir: Path
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
    if "EarlyStopping" in state["callbacks"]:
        run.early_stopping.load_state_dict(state["callbacks"]["EarlyStopping"])
    os.truncate(run.run_dir / "metrics.jsonl", state["loggers"]["JSONL"]["size"])
    if (run.progress.stopped_by or "").startswith("SIG") or run.progress.stopped_by in DURATIONS:
        run.progress.stopped_by = "max_epochs" if run.progress.epoch >= MAX_EPOCHS else None  # it may be longer now
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

    step: int  # steps that were made, earlier sessions counted in
    metrics: dict[str, float]  # of the last validation; of the last log point where nothing was validated
    best: Path | None  # the best checkpoint by the monitored metric
    run_dir: Path


def result_of(run_dir: Path, progress: Progress) -> Result:
    """Return how a run ended."""
    link = run_dir / "checkpoints" / "best"
    best = link.parent / link.readlink() if link.is_symlink() else None
    return Result(step=progress.step, metrics=progress.metrics, best=best, run_dir=run_dir)


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


def log_training(run: Run) -> None:
    """Read what the steps since the last log point returned, and hand it to the loggers. The host waits for the device here."""
    check(run.watch)
    logged = {f"train/{name}": value for name, value in run.metrics.read().items()}
    if run.progress.validated_at < 0:
        run.progress.metrics = logged
    report(run.tensor_board, run.run_dir, run.progress, logged)


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


def is_among_best(run_dir: Path, progress: Progress) -> bool:
    """Whether the metrics of a validation, right behind it, belong to the best that are kept."""
    value = progress.metrics[MONITOR]
    step = progress.step
    earlier = [m["metrics"].get(MONITOR) for m in committed(run_dir / "checkpoints").values() if m["step"] < step]
    others = [other for other in earlier if isinstance(other, (int, float))]
    as_good = [other for other in others if other >= value]
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
    found = committed(directory)
    # The newest of each step; what is left of later ones will be made again.
    saves = {manifest["step"]: path for path, manifest in found.items() if manifest["step"] <= step}
    paths = list(saves.values())
    values = {path: found[path]["metrics"].get(MONITOR) for path in paths}
    rated = [path for path, value in values.items() if isinstance(value, (int, float))]
    best = sorted(rated, key=values.__getitem__, reverse=True)[:1]  # of equals the older
    staying = {*paths[-KEEP_LAST:], *best}
    for link, path in [("last", saves[step]), *(("best", path) for path in best[:1])]:
        (directory / f".{link}").unlink(missing_ok=True)
        (directory / f".{link}").symlink_to(path.name)
        (directory / f".{link}").rename(directory / link)
    for path in found.keys() - staying:
        (path / "manifest.json").unlink()
        shutil.rmtree(path)


def save(run: Run, scheduled_steps: int | None, data: Data) -> None:
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
            "scheduled_steps": scheduled_steps,
            "schedulers": {"optimizer": run.scheduler.state_dict()},
            "scheduler_classes": {"optimizer": type(run.scheduler).__name__},
            "scaler": None,
            "callbacks": {"EarlyStopping": run.early_stopping.state_dict()},
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
    write(run.run_dir / "checkpoints", run.progress.step, groups, state, run.run_id, encode(measured, {}))
    prune(run.run_dir / "checkpoints", run.progress.step)


def fit(
    model: nn.Module,
    step_function: Any,
    train_loader: Any,
    val_loader: Any,
    optimizer: Optimizer,
    make_scheduler: Any,
    early_stopping: EarlyStopping,
    tensor_board: TensorBoard,
) -> Result:
    """Train the model."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    train = Data(train_loader, device)
    model.to(device)
    steps = MAX_EPOCHS * train.steps_per_epoch
    scheduler = make_scheduler(optimizer, steps)
    run_dir = Path(RUN_DIR)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").touch()  # a checkpoint notes how long it is
    checkpoint = newest_good(run_dir / "checkpoints")
    manifest = json.loads((checkpoint / "manifest.json").read_text()) if checkpoint is not None else None
    run_id = manifest["run_id"] if manifest is not None else secrets.token_hex(4)
    run = Run(model, optimizer, scheduler, early_stopping, run_dir, tensor_board, run_id)
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
        for batch, at_end in train.epochs(run.progress.epoch, run.progress.batch, restore_random):
            samples = len(batch[0])
            run.progress.step += 1
            with autocast:
                output = step_function(model, batch)
            loss = output["loss"]
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
            stop = "max_epochs" if run.progress.epoch >= MAX_EPOCHS else None

            if stop is not None or run.progress.step % LOG_EVERY_N_STEPS == 0:
                log_training(run)
            if stop is not None or at_end:
                measured = evaluate(model, step_function, val_loader, "val/", device, autocast)
                run.progress.metrics = measured
                run.progress.validated_at = run.progress.step
                report(tensor_board, run_dir, run.progress, measured)
                stop = early_stopping.on_validation_end(run.progress.step, measured) or stop

            if signals.received is not None and stop is None:
                stop = signals.received
            if stop is not None:
                run.progress.stopped_by = stop
                break
            if run.progress.step % CHECKPOINT_EVERY_N_STEPS == 0 or (
                run.progress.validated_at == run.progress.step and is_among_best(run_dir, run.progress)
            ):
                save(run, steps, train)
        goes_on = (run.progress.stopped_by or "").startswith("SIG")
        if not goes_on:
            if run.metrics:
                log_training(run)
        save(run, steps, train)
    if signals.received is not None:
        raise SystemExit(EXIT_STATUS)
    return result_of(run_dir, run.progress)


def test_metrics(
    model: nn.Module, step_function: Any, loader: Any, result: Result, tensor_board: TensorBoard
) -> dict[str, float]:
    """Return the means of what a step returns, over all batches of a loader."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    model.load_state_dict(load_file(result.run_dir / "checkpoints" / "best" / "model.safetensors"))
    model.to(device)
    metrics = evaluate(model, step_function, loader, "test/", device, autocast)
    with (result.run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": result.step, "time": round(time.time(), 3), **metrics}) + "\n")
    tensor_board.start_again(result.run_dir)
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
result = fit(model, step, train_loader, val_loader, optimizer, scheduler, early_stopping, tensor_board)
print(result.metrics)  # {"val/loss": ..., "val/accuracy": ...}
print(test_metrics(model, step, test_loader, result, tensor_board))  # {"test/loss": ..., "test/accuracy": ...}

model.load_state_dict(load_file(result.best / "model.safetensors"))  # all that serving needs
