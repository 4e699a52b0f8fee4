"""The folder of a run: its place, its `run.json`, and whether a run may go on in it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sheer.checkpoint.disk import sync
from sheer.checkpoint.store import sealed
from sheer.errors import RunError, SettingsError, SheerWarning, user_level
from sheer.launch import overrides
from sheer.settings import Settings
from sheer.version import __version__

if TYPE_CHECKING:
    from filelock import FileLock

# On resume these may differ: how long, how often, where; nothing that changes what a step computes.
FREE = frozenset(
    {
        "max_steps", "max_epochs", "max_time", "device", "log_every_n_steps", "validate_every_n_steps", "validate_first",
        "limit_val_batches", "checkpoint", "run_dir", "resume", "detect_anomaly", "parallel", "activation_memory_budget",
    }
)  # fmt: skip


LOCK = ".lock"  # held by the process that trains in a folder


def choose_run_dir(cfg: Settings) -> Path:
    """Return the run's folder: the one that was set, or `runs/<script>/<time>`.

    Raises:
        RunError: it cannot be made.
    """
    if cfg.run_dir is not None:
        return Path(cfg.run_dir)
    try:
        return folder_of_now(f"runs/{main_script().stem}/")
    except OSError as error:
        raise RunError(f"The run directory {error.filename} cannot be made: {error.strerror}. Set run_dir.") from error


def folder_of_now(start: str) -> Path:
    """Make a folder that nobody else has, and return it: its path begins so, and ends with the time.

    Raises:
        OSError: it cannot be made.
    """
    path = start + time.strftime("%Y-%m-%d_%H-%M-%S")
    candidates = map(Path, itertools.chain([path], (f"{path}-{number}" for number in itertools.count(2))))
    return next(candidate for candidate in candidates if was_made(candidate))


def was_made(path: Path) -> bool:
    """Make a folder; False where it was there: another process of the script began in the same second."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def main_script() -> Path:
    """Return the script that Python was started with; `interactive` where there is none."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(main) if main else Path("interactive")


def run_record(path: Path, cfg: Settings, hparams: Mapping[str, Any], seed: int, run_id: str) -> dict[str, Any]:
    """Return the `run.json` of a new run, which gets this id, or that of the run in `path` that goes on, with this start added. Nothing is written.

    Raises:
        RunError: the folder holds a run and `resume` is not set; or what may not differ differs; or it is no folder.
    """
    file = path / "run.json"
    if path.exists() and not path.is_dir():
        raise RunError(f"run_dir={str(path)!r} is a file, and the run needs a folder. Give another run_dir.")
    if file.exists() and cfg.resume != "auto":
        raise holds_a_run(path)
    settings = dataclasses.asdict(cfg)
    record: dict[str, Any] = read_record(file) if file.exists() else {}
    if record:
        refuse_differences(path, record["settings"], settings)
        refuse_other_directory(path, record["settings"].get("checkpoint"), settings["checkpoint"])
        warn_of_differences(path, record, plain(hparams), seed)
    else:
        record = {
            "id": run_id,
            "seed": seed,
            "settings": settings,
            "hparams": plain(hparams),
            "sessions": [],
        }
    record["sessions"].append({**describe_start(), "hparams": plain(hparams)})
    return record


def warn_of_differences(path: Path, record: Mapping[str, Any], hparams: Any, seed: int) -> None:
    """Warn of hyper-parameters that are not those of the run that goes on, and of another seed, where both were set."""
    before = record["sessions"][-1].get("hparams", record["hparams"]) if record["sessions"] else record["hparams"]
    said = [
        f"{name}: {before.get(name, 'not there')!r} then, {hparams.get(name, 'not there')!r} now"
        for name in {**before, **hparams}
        if before.get(name) != hparams.get(name)
    ]
    if seed != record["seed"] and max(seed, record["seed"]) < 2**32:  # one that PyTorch chose is larger
        said.append(f"seed: {record['seed']} then, {seed} now (the order of the data stays that of the first)")
    if said:
        warnings.warn(
            f"The run in {path} goes on with other hyper-parameters: {'; '.join(said)}.",
            SheerWarning,
            stacklevel=user_level(),
        )


def read_record(file: Path) -> dict[str, Any]:
    """Read a `run.json`.

    Raises:
        RunError: it is damaged.
    """
    try:
        text = file.read_text()
        record: dict[str, Any] = json.loads(text)
        del record["sha256"]
        if sealed(record) != text:
            raise ValueError("its content is not what was written (SHA-256)")
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{file} is damaged: {type(error).__name__}: {error}. To go on from its checkpoints in a new folder, set "
            f'resume="{file.parent}" and another run_dir.'
        ) from error
    return record


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write `run.json`, whole or not at all, and make the folder if it is not there. The caller holds the folder's lock.

    Raises:
        RunError: it cannot be written, or a run was begun there meanwhile; nothing is left behind.
    """
    file, temporary = path / "run.json", path / ".run.json.tmp"
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        if is_new(record) and file.exists():  # since `run_record` looked, and before the lock was held
            raise holds_a_run(path)
        temporary.write_text(sealed(record))
        sync(temporary)
        temporary.replace(file)
        sync(path)
    except OSError as error:
        if path.is_dir():
            temporary.unlink(missing_ok=True)
            if is_new(record):
                forget(path)
        raise not_writable(path, error) from error


def not_writable(path: Path, error: OSError) -> RunError:
    """Build the error for a folder that nothing can be written to."""
    return RunError(
        f"The run directory {path} cannot be written: {error.strerror}. Give another run_dir, or make room."
    )


def is_new(record: Mapping[str, Any]) -> bool:
    """Whether a run is begun here for the first time."""
    return len(record["sessions"]) == 1


def forget(path: Path) -> None:
    """Take away what a run that did nothing has left in its folder, so that the next start, the mistake mended, finds it free."""
    (path / "run.json").unlink(missing_ok=True)
    lines = path / "metrics.jsonl"
    if lines.exists() and lines.stat().st_size == 0:
        lines.unlink()
    (path / LOCK).unlink(missing_ok=True)
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def holds_a_run(path: Path) -> RunError:
    """Build the error for a folder that is taken."""
    return RunError(
        f'{path} already holds a run. To go on with it, set resume="auto"; to start another, give another run_dir (or delete that folder).'
    )


def refuse_differences(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `RunError` with the list of settings that differ from those of the run that is to go on."""
    differing = [
        f"  {name}: {before[name]!r} then, {value!r} now"
        for name, value in now.items()
        if name not in FREE and name in before and before[name] != value and not are_strict(name, before[name], value)
    ]
    if differing:
        raise RunError(
            f"{path} holds a run with other settings, which would not be the same run any more:\n"
            + "\n".join(differing)
            + "\nPut them back, or give another run_dir. Durations, cadences and loggers may change."
        )


def are_strict(name: str, before: Any, now: Any) -> bool:
    """Whether both are ways to deal with a NaN that leave no trace of it in the weights: an error, and going back."""
    return name == "nonfinite" and all(how == "raise" or isinstance(how, Mapping) for how in (before, now))


def lock(path: Path) -> FileLock:
    """Take a run's folder for this process, until it is released or the process ends.

    Raises:
        RunError: another process trains in it, as after a start by mistake or by a cluster that did not end the first.
    """
    from filelock import FileLock, Timeout

    held = FileLock(path / LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
    except Timeout as error:
        raise RunError(
            f"Another process is training in {path} at this moment, or a run of this one that was not finished (run.finish()). Wait for it, stop "
            "it, or give another run_dir."
        ) from error
    except OSError as error:
        raise not_writable(path, error) from error
    return held


def refuse_other_directory(path: Path, before: Any, now: Any) -> None:
    """Raise `RunError` where a run that goes on would look for its checkpoints elsewhere than they are."""
    places = [saves.get("directory") if isinstance(saves, dict) else None for saves in (before, now)]
    if None not in (before, now) and places[0] != places[1]:
        raise RunError(
            f"The run in {path} keeps its checkpoints in {places[0] or path / 'checkpoints'}, and directory={places[1]!r} now: it would begin anew. Put "
            "it back; to move them, give another run_dir and directory, and resume=<where they are>."
        )


def describe_start() -> dict[str, Any]:
    """Describe this start: when, by which command, from which state of the code, on what."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": start_command(),
        "script": str(main_script()),
        "git": git_state(main_script().parent),
        "versions": {"sheer": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "host": platform.node(),
    }


def start_command() -> list[str]:
    """Return the command that repeats this start, with what `sheer run --set` sets."""
    changes = [word for name, value in overrides().items() for word in ("--set", f"{name}={value}")]
    return [sys.executable, *(["-m", "sheer", "run", *changes] if changes else []), *sys.argv]


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit that the code is at, and whether it was changed since; None outside of git."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changes)}


def as_mapping(hparams: Any) -> dict[str, Any]:
    """Return hyper-parameters as a dict: from a mapping, a dataclass or a namespace."""
    if hparams is None:
        return {}
    if isinstance(hparams, Mapping):
        return dict(hparams)
    if dataclasses.is_dataclass(hparams) and not isinstance(hparams, type):
        return dataclasses.asdict(hparams)
    if hasattr(hparams, "__dict__"):
        return dict(vars(hparams))
    raise SettingsError(f"hparams must be a mapping, a dataclass or a namespace, not a {type(hparams).__name__}.")


def plain(value: Any) -> Any:
    """Return a value as JSON; what JSON does not know is written as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
