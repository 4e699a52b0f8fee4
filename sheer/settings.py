"""What a run is told: frozen dataclasses of literals, checked as they are built."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.distributed.device_mesh import DeviceMesh

from sheer.errors import ContradictionError, SettingsError

Precision = Literal["32-true", "tf32-true", "bf16-mixed", "16-mixed", "float8-mixed", "bf16-true", "64-true"]
ClipAlgorithm = Literal["norm", "value"]
SchedulerInterval = Literal["step", "epoch", "validation"]
NonFinite = Literal["raise", "skip", "ignore"]
MonitorMode = Literal["min", "max"]
Parallelism = Literal["auto", "none", "ddp", "fsdp"]
Dtype = Literal["float32", "bfloat16", "float16"]
PipelineSchedule = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]  # fmt: skip
DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # of the mesh of ranks, outermost first
CompileMode = Literal["blocks", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
# Settings that are strings, and what each may be.
NAMED = {
    "device": '"auto", or one such as "cpu" or "cuda"',
    "monitor": 'a metric such as "val/loss", or None for none',
    "run_dir": "a folder, or None for one named by the time",
    "resume": '"auto" or a checkpoint, or None for a new run',
}
MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # of compile: they capture CUDA graphs themselves


@dataclass(frozen=True, kw_only=True)
class Compile:
    """How to compile, where `compile=True` says too little."""

    mode: CompileMode | None = None  # as `compile` takes it; None: as with True
    activation_memory_budget: float = (
        1.0  # the share of the activations' memory that is used, from 0.0 to 1.0; the rest is computed again
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_budget(self.activation_memory_budget)


def check_budget(budget: float) -> None:
    """Raise `SettingsError` for a budget that is no share."""
    if not 0.0 <= budget <= 1.0:
        raise SettingsError(
            f"activation_memory_budget is a share of the memory that the activations take, from 0.0 (keep next to none) to 1.0 (keep "
            f"all), not {budget!r}."
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When a run is saved, and which saves are kept. It is always saved at its end and when it is told to stop."""

    every_n_steps: int | None = None  # save after every n-th step; None: not by steps
    every_n_epochs: int | None = None  # save after every n-th epoch; None: not by epochs
    keep_last: int = 2  # how many of the newest checkpoints stay; with one, a damaged one has none before it
    keep_best: int = 1  # how many of the best by `monitor` stay; saved when a validation finds them
    keep_every_n_steps: int | None = None  # those of each n-th step stay for good; None: none does
    directory: str | None = (
        None  # where checkpoints are kept, one run's alone: a path, or a URL such as "s3://bucket/run"; None: in run_dir
    )
    asynchronous: bool = True  # write beside training, which waits only for a copy in the host's memory

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, every_n_steps=1, every_n_epochs=1, keep_last=1, keep_best=0, keep_every_n_steps=1)


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Going back to the last good checkpoint when a loss or a gradient is NaN or infinite, or the loss spikes; then on without the batches of these steps."""

    max_times: int = 3  # how often a run goes back; the next time is an error
    spike: float | None = (
        None  # a loss of more than so many times the median of the last 50 is bad, too; None: no finite loss is
    )

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, max_times=1)
        if self.spike is not None and not 1.0 < self.spike < float("inf"):
            raise SettingsError(
                f"spike must be above 1, not {self.spike!r}: it is how many times the median of the losses before it a loss must be to count as a spike."
            )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a model and its batches are divided over ranks: the sizes of the dimensions of one mesh. On one rank nothing is divided."""

    dp_replicate: int = 1  # copies of the model, each trained on its part of the batch; -1: as many as there are ranks
    dp_shard: int = -1  # ranks that share the parameters of one copy (FSDP2); -1: all ranks that are left
    tp: int = 1  # ranks that share the work of single layers, by a plan given to `fit` (tensor and sequence parallel)
    pp: int = 1  # ranks that the layers are divided over, one behind the other
    cp: int = 1  # parts that each sequence is cut into, along `seq_dim`
    shard_modules: tuple[str, ...] | None = (
        None  # classes whose modules are sharded each by itself; None: repeated blocks
    )
    shard_min_parameters: int | None = None  # shard each module with at least this many parameters instead
    reshard_after_forward: bool = (
        True  # free the gathered parameters behind each forward; False: keep them for the backward
    )
    param_dtype: Dtype | None = None  # what sharded parameters are gathered and computed in; None: by `precision`
    reduce_dtype: Dtype | None = (
        None  # what gradients are summed over ranks in; None: float32 or that of the parameters
    )
    cpu_offload: bool = False  # keep sharded parameters, gradients and optimizer state in the host's memory
    find_unused_parameters: bool = False  # let DDP expect steps whose loss does not reach every parameter
    pp_split: tuple[str, ...] = ()  # modules at which a stage of the pipeline begins, such as "blocks.4"
    pp_schedule: PipelineSchedule = "1F1B"  # in which order forward and backward passes of micro-batches run
    pp_micro_batches: int | None = None  # micro-batches of a step in the pipeline; None: twice the ranks
    seq_dim: int | None = None  # the dimension of the batch's tensors that runs along the sequence, for `cp`
    cp_buffers: tuple[str, ...] = ()  # the model's buffers that run along the sequence in their first dimension
    timeout: float = 600.0  # seconds that ranks wait for one another before the run ends with an error
    mesh: DeviceMesh | None = (
        None  # a mesh that you made, which then says the sizes: its dimensions are called as they are here
    )

    def __post_init__(self) -> None:
        check_types(self)
        if self.mesh is not None:
            self._take_sizes(mesh_sizes(self.mesh))
        for name in ("dp_replicate", "dp_shard"):
            value = getattr(self, name)
            if value < 1 and value != -1:
                raise SettingsError(f"{name} must be at least 1, or -1 for all ranks that are left, not {value!r}.")
        at_least(self, tp=1, pp=1, cp=1, shard_min_parameters=1, pp_micro_batches=1)
        if not self.timeout > 0:
            raise SettingsError(f"timeout must be above 0, not {self.timeout!r}.")
        if self.dp_replicate == -1 and self.dp_shard == -1:
            raise SettingsError(
                "dp_replicate=-1 and dp_shard=-1 both take all ranks that are left. Give one of them a number."
            )
        if self.cp > 1 and self.seq_dim is None:
            raise SettingsError(
                f"cp={self.cp} cuts sequences, and seq_dim does not say which dimension they are. Give seq_dim=1, say."
            )
        if self.pp > 1 and not self.pp_split:
            raise SettingsError(
                f'pp={self.pp} divides the layers, and pp_split does not say where. Name the modules that begin a stage: pp_split=("blocks.4",).'
            )
        if self.shard_modules is not None and self.shard_min_parameters is not None:
            raise SettingsError("shard_modules and shard_min_parameters both say what is sharded by itself. Give one.")

    def _take_sizes(self, sizes: Mapping[str, int]) -> None:
        """Take the sizes of the mesh that was given; one that is given beside it must be the same."""
        for name, size in sizes.items():
            value = getattr(self, name)
            if value not in (size, -1 if name == "dp_shard" else 1):
                raise SettingsError(
                    f"{name}={value}, and the mesh that was given has {size} there. The mesh says the sizes: leave {name} out."
                )
            object.__setattr__(self, name, size)


def mesh_sizes(mesh: DeviceMesh) -> dict[str, int]:
    """Return the size of each dimension that a mesh of ranks can have; 1 of one that a given mesh has not.

    Raises:
        SettingsError: its dimensions are called otherwise, or lie in another order.
    """
    names = mesh.mesh_dim_names or ()
    said = f"The mesh has dimensions called {names}" if names else "The mesh's dimensions have no names"
    known = ", ".join(DIMENSIONS)
    if "dp" in names:
        raise SettingsError(
            f'{said}. "dp" does not say what its ranks do: call it "dp_replicate" if each is to hold the whole model (DDP), or "dp_shard" if '
            "they are to share its parameters (fully_shard)."
        )
    if not names or not set(names) <= set(DIMENSIONS):
        raise SettingsError(
            f"{said}, and a run knows {known}. Make it with init_device_mesh(device, sizes, mesh_dim_names=(...)) of these names."
        )
    if list(names) != [name for name in DIMENSIONS if name in names]:
        raise SettingsError(f"{said}, in an order that is not that of a run: {known}, of which any may be missing.")
    return {name: mesh.size(names.index(name)) if name in names else 1 for name in DIMENSIONS}


def mesh_of(settings: Settings) -> DeviceMesh | None:
    """Return the mesh that a user made, if there is one."""
    return settings.parallel.mesh if isinstance(settings.parallel, Parallel) else None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that can be written down about a run: literals, with one meaning each."""

    max_steps: int | None = None  # stop after this many steps, counted from the start of the run
    max_epochs: int | None = None  # stop after this many passes over the training data
    max_time: float | None = None  # stop after this many seconds of training, resumed runs counted in
    device: str = "auto"  # "auto" takes the accelerator if there is one; or "cpu", "cuda", "cuda:1", "mps", ...
    precision: Precision = "32-true"  # "-mixed" is autocast, "-true" converts model and batches
    parallel: Parallelism | Parallel = "auto"  # "auto": "ddp" on several ranks, else "none"
    compile: bool | CompileMode = (
        False  # torch.compile the model, and the step of a fit on one device; "blocks": its repeated blocks alone; else the mode
    )
    activation_memory_budget: float = 1.0  # given as compile=Compile(activation_memory_budget=...)
    cuda_graph: bool = False  # replay each step as one CUDA graph: less time between kernels, for small models most
    autotune: bool = False  # before the run try compile, graphs, precisions, workers, ..., and take what is fastest
    gradient_clip_val: float | None = None  # clip gradients to this norm, or to this absolute value
    gradient_clip_algorithm: ClipAlgorithm = "norm"  # what `gradient_clip_val` bounds
    accumulate_grad_batches: int = 1  # batches of the loader in one step
    micro_batch_size: int | None = None  # samples in one forward pass of training; None: the whole batch at once
    scheduler_interval: SchedulerInterval = "step"  # what moves the scheduler: each step, epoch or validation
    nonfinite: NonFinite | Rollback = "raise"  # what a NaN or infinite loss or gradient does
    log_every_n_steps: int = 50  # steps between two log points; the only points where the host waits for the device
    validate_every_n_steps: int | None = None  # steps between validations; None: at the end of each epoch
    validate_first: bool = False  # also validate before the first step
    limit_train_batches: int | float | None = None  # batches an epoch (int), or a share of them (float)
    limit_val_batches: int | float | None = None  # batches a validation (int), or a share (float); 0: none
    overfit_batches: int = 0  # train on the first n batches only, the same ones each epoch; 0: on all
    fast_dev_run: bool | int = False  # run n steps and validation batches, keeping nothing; True: one
    monitor: str | None = None  # the metric that says which checkpoint is best, such as "val/loss"
    monitor_mode: MonitorMode = "min"  # whether less or more of it is better
    deterministic: bool = False  # only deterministic algorithms; an operation that has none is an error
    detect_anomaly: bool = False  # let autograd name the operation that made a NaN; slow
    checkpoint: Checkpoint | None = field(default_factory=Checkpoint)  # when to save and what to keep; None: never
    run_dir: str | None = None  # the folder of the run; None: one named by the time, in runs/<script>
    resume: str | None = None  # "auto" goes on where `run_dir` stopped; or a checkpoint's path; None: a new run

    def __post_init__(self) -> None:
        check_types(self)
        at_least(
            self,
            max_steps=1,
            max_epochs=1,
            accumulate_grad_batches=1,
            micro_batch_size=1,
            log_every_n_steps=1,
            validate_every_n_steps=1,
            overfit_batches=0,
            fast_dev_run=0,
        )
        for name, expected in NAMED.items():
            if getattr(self, name) == "":
                raise SettingsError(f"{name} is empty: give {expected}.")
        for name in ("max_time", "gradient_clip_val"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingsError(f"{name} must be above 0, not {value!r}.")
        for name in ("limit_train_batches", "limit_val_batches"):
            value = getattr(self, name)
            if isinstance(value, float) and not 0.0 <= value <= 1.0:
                raise SettingsError(
                    f"{name} as a float is a share, from 0.0 to 1.0, not {value!r}. For a number of batches give an int."
                )
            if isinstance(value, int) and value < 0:
                raise SettingsError(f"{name} must be at least 0, not {value!r}.")
        if self.limit_train_batches is not None and not self.limit_train_batches:
            raise SettingsError("limit_train_batches=0 leaves nothing to train on; leave it out, or give at least 1.")
        check_budget(self.activation_memory_budget)
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        if self.activation_memory_budget < 1.0 and not self.compile:
            raise ContradictionError(
                f"activation_memory_budget={self.activation_memory_budget!r} is kept by the compiler, and compile=False. Set compile=True."
            )
        if self.cuda_graph and self.compile in MODES_WITH_GRAPHS:
            raise ContradictionError(
                f'compile="{self.compile}" makes CUDA graphs of its own, of the model alone, and cuda_graph=True makes one of the whole step. '
                'Set compile=True, or compile="max-autotune-no-cudagraphs".'
            )
        if self.cuda_graph and self.detect_anomaly:
            raise ContradictionError(
                "detect_anomaly looks at each value on the host, which cuda_graph=True rules out. Leave one of them out."
            )
        if isinstance(self.nonfinite, Rollback):
            self._check_rollback()
        if self.gradient_clip_algorithm == "value" and self.gradient_clip_val is None:
            raise ContradictionError(
                'gradient_clip_algorithm="value" says how to clip, but gradient_clip_val says not to. Give gradient_clip_val.'
            )
        if self.overfit_batches and self.limit_train_batches is not None:
            raise ContradictionError(
                f"overfit_batches={self.overfit_batches} and limit_train_batches={self.limit_train_batches} both say how many batches to train on. Give one."
            )
        if self.fast_dev_run and self.resume not in (None, "auto"):
            raise ContradictionError(
                f"fast_dev_run keeps nothing and starts afresh, so it cannot go with resume={self.resume!r}. Leave one of them out."
            )
        if self.resume == "auto" and self.checkpoint is None:
            raise ContradictionError(
                'resume="auto" goes on from the last checkpoint, and checkpoint=False saves none. Leave one of them out.'
            )
        if self.monitor is None and self.checkpoint is not None and self.checkpoint.keep_best > 1:
            raise ContradictionError(
                f'Checkpoint(keep_best={self.checkpoint.keep_best}) keeps the best by monitor, and that names no metric. Give monitor="val/...".'
            )
        if self.resume == "auto" and self.run_dir is None:
            raise ContradictionError(
                'resume="auto" looks for the run in run_dir, and there is none: each start would make a new folder. '
                'Give run_dir="runs/<a name>".'
            )
        if self.monitor_mode == "max" and self.monitor is None:
            raise ContradictionError(
                'monitor_mode="max" says which way is better, but monitor names no metric. Give monitor="val/...".'
            )

    def _check_rollback(self) -> None:
        if self.checkpoint is None:
            raise ContradictionError(
                "nonfinite=Rollback(...) goes back to a checkpoint, and checkpoint=False saves none. Leave one of them out."
            )
        if self.cuda_graph:
            raise ContradictionError(
                "nonfinite=Rollback(...) puts the run back to a checkpoint, which cuda_graph=True cannot follow yet: a graph writes where the state was. "
                'Leave one of them out, or set nonfinite="skip".'
            )
        if self.detect_anomaly:
            raise ContradictionError(
                "detect_anomaly=True ends the run in the step that makes a NaN, and nonfinite=Rollback(...) goes back from it. Leave one of them out."
            )


def expanded(settings: Settings, world_size: int = 1) -> Settings:
    """Return settings with what `parallel` means on so many ranks, and what `fast_dev_run` stands for: n steps, n batches of validation, nothing kept."""
    settings = dataclasses.replace(settings, parallel=_parallel_on(settings.parallel, world_size))
    if not settings.fast_dev_run:
        return settings
    steps = int(settings.fast_dev_run)
    return dataclasses.replace(
        settings,
        max_steps=steps,
        max_epochs=None,
        max_time=None,
        limit_val_batches=steps,
        checkpoint=None,
        resume=None,  # "auto" may stand in the script
        nonfinite=without_rollback(settings),
    )


def without_rollback(settings: Settings) -> NonFinite:
    """Return what a NaN does in a run that keeps nothing it could go back to."""
    return "raise" if isinstance(settings.nonfinite, Rollback) else settings.nonfinite


def _parallel_on(parallel: Parallelism | Parallel, world_size: int) -> Parallelism | Parallel:
    """Return "none" on one rank, else how the ranks are used."""
    if world_size == 1:
        return "none"
    if parallel == "none":
        raise SettingsError(
            f'parallel="none" trains on one rank, and {world_size} were started: each would train by itself. Start one, or set parallel="ddp".'
        )
    if isinstance(parallel, Parallel):
        return dataclasses.replace(parallel, mesh=None)  # its sizes stay; a mesh itself cannot be written down
    return Parallel() if parallel == "fsdp" else Parallel(dp_replicate=-1, dp_shard=1)


def check_types(settings: Any) -> None:
    """Raise `SettingsError` for the first field of a dataclass whose value is not of the type that it declares."""
    hints = typing.get_type_hints(type(settings))
    for name, hint in hints.items():
        value = getattr(settings, name)
        if not _matches(value, hint):
            raise SettingsError(f"{name} must be {describe_type(hint)}, not {value!r}{_hint(value, hint)}.")


def _matches(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments and any(type(value) is type(argument) for argument in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple:  # of any length, of one kind
        return isinstance(value, tuple) and all(_matches(item, arguments[0]) for item in value)
    return isinstance(value, hint)


def describe_type(hint: Any) -> str:
    """Say a type in the words of an error message: `one of "a", "b"`, `an int or None`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(f'"{argument}"' for argument in arguments)
    if origin is tuple:
        return f"a tuple, each of it {describe_type(arguments[0])}"
    names = {int: "an int", float: "a float", str: "a string", bool: "True or False", types.NoneType: "None"}
    return names.get(hint, f"a {getattr(hint, '__name__', hint)}")


def _hint(value: object, hint: Any) -> str:
    literals = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is Literal]
    choices = [str(choice) for literal in literals for choice in typing.get_args(literal)]
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return f' (did you mean "{near[0]}"?)' if near else ""


def at_least(settings: object, **minimums: int) -> None:
    """Raise `SettingsError` for the first named field that is a number below its minimum."""
    for name, minimum in minimums.items():
        value = getattr(settings, name)
        if value is not None and value < minimum:
            raise SettingsError(f"{name} must be at least {minimum}, not {value!r}.")


def unknown_name(name: str, known: typing.Iterable[str], what: str) -> SettingsError:
    """Build the error for a name that is not there, with the nearest one that is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."
    return SettingsError(f"{what} has no {name!r}. {advice}")


def seconds(text: str) -> float:
    """Read "DD:HH:MM:SS", "HH:MM:SS" or "MM:SS" as a number of seconds."""
    parts = text.split(":")
    if not 2 <= len(parts) <= 4 or not all(part.strip().isdigit() for part in parts):
        raise SettingsError(
            f'max_time must be a number of seconds or a string such as "00:12:00:00" (days, hours, minutes, seconds), not {text!r}.'
        )
    return float(sum(int(part) * unit for part, unit in zip(reversed(parts), (1, 60, 3600, 86400), strict=False)))


def overridden(settings: Settings, changes: Mapping[str, str]) -> Settings:
    """Return `settings` with fields replaced by values written as text: {"max_steps": "50", "checkpoint.keep_last": "3"}."""
    read = {path: read_literal(text) for path, text in changes.items()}
    changed: Settings = _with_fields(settings, "", read)
    return changed


def read_literal(text: str) -> Any:
    """Read a value as Python or a shell writes it (50, 1e3, 0.1, None, true); anything else is a string."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    whole = isinstance(value, float) and value.is_integer() and "." not in text
    return int(value) if whole else value


def _with_fields(record: Any, above: str, given: Mapping[str, Any]) -> Any:
    """Replace fields of a record, and of records in it, all at once: what goes together may come in any order."""
    known = [field.name for field in dataclasses.fields(record)]
    new: dict[str, Any] = {}
    inside: dict[str, dict[str, Any]] = {}
    for path, value in given.items():
        name, _, rest = path.partition(".")
        if name in ("callbacks", "loggers", "hparams"):
            raise SettingsError(f"{name} are objects, and no settings: give them to Trainer, in the script.")
        if name not in known:
            raise unknown_name(above + path, known, "Settings")
        if rest:
            inside.setdefault(name, {})[rest] = value
        else:
            new[name] = _as_field(name, value)
    for name, parts in inside.items():
        inner = new.get(name, getattr(record, name))
        if inner is None and name == "checkpoint":
            inner = Checkpoint()
        if name == "parallel" and isinstance(inner, str):
            inner = Parallel()
        if name == "nonfinite" and isinstance(inner, str):
            inner = Rollback()
        if not dataclasses.is_dataclass(inner):
            raise SettingsError(f"{name} has no parts, so {name}.{next(iter(parts))} cannot be set; set {name}.")
        new[name] = _with_fields(inner, f"{above}{name}.", parts)
    return dataclasses.replace(record, **new)


def _as_field(name: str, value: Any) -> Any:
    """Return what a value that was read from text means for a field."""
    if name == "max_time" and isinstance(value, str):
        return seconds(value)
    if name == "checkpoint" and isinstance(value, bool):
        return Checkpoint() if value else None
    if name in ("shard_modules", "pp_split", "cp_buffers") and isinstance(value, str):
        return tuple(value.split(","))
    return value
