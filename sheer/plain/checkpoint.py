"""Checkpoints: written whole or not at all, found, checked and pruned."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from sheer.checkpoint.optimizer import names_of
from sheer.distributed.mesh import Ranks


def plain_write(
    folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Any, run_id: str, measured: Any
) -> Path:
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
        plain_sync(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": plain_sha256(file)}
    manifest = {"format": 2, "step": step, "torch": torch.__version__, "world_size": 1, "run_id": run_id}
    manifest |= {"metrics": measured, "settings": {}, "leads": [0], "files": files}
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (path / "manifest.tmp").write_text(json.dumps(manifest, indent=1))
    plain_sync(path / "manifest.tmp")
    (path / "manifest.tmp").rename(path / "manifest.json")
    return path


def plain_sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def plain_sha256(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_committed(directory: Path) -> dict[Path, Any]:
    """Return the checkpoints in a folder, oldest first, each with its manifest."""
    return {path.parent: json.loads(path.read_text()) for path in sorted(directory.glob("step-*/manifest.json"))}


def plain_newest_good(directory: Path) -> Path | None:
    """Return the newest checkpoint whose files are as they were written; None where there is none at all."""
    found = plain_committed(directory)
    for path, manifest in reversed(found.items()):
        files = manifest["files"].items()
        if all((path / name).is_file() and plain_sha256(path / name) == file["sha256"] for name, file in files):
            return path
    if found:
        raise RuntimeError(f"No checkpoint in {directory} is as it was written. To start anew, give another run_dir.")
    (directory.parent / "metrics.jsonl").write_text("")  # of a run that was killed before its first save
    return None


def plain_checkpoint_in(path: Path) -> Path:
    """Return the checkpoint that a path means: itself, or the last one of a run."""
    return path if (path / "manifest.json").is_file() else (path / "checkpoints" / "last").resolve()


def plain_manifest(path: Path) -> Any:
    """Read the manifest of a checkpoint."""
    return json.loads((path / "manifest.json").read_text())


def plain_stored(path: Path, manifest: Any, group: str) -> dict[str, Tensor]:
    """Read one file of tensors; empty where the checkpoint has none of that name."""
    return next(map(load_file, path.glob(f"{group}.safetensors")), {})


def plain_state(path: Path, manifest: Any) -> Any:
    """Read all but the weights."""
    read = json.loads((path / "state.json").read_text())
    if read["progress"].get("owes_validation"):
        raise RuntimeError(f"{path} was saved in a validation, which only Sheer goes on with.")
    tensors = {**load_file(path / "optimizer.safetensors"), **load_file(path / "state.safetensors")}
    return plain_decode(read, tensors)


def plain_prune(
    directory: Path, step: int, *, keep_last: int, keep_best: int, every: int | None, monitor: str | None, mode: str
) -> None:
    """Point `last` and `best` at the newest and the best checkpoint, and delete what does not stay."""
    found = plain_committed(directory)
    # The newest of each step; what is left of later ones will be made again.
    saves = {manifest["step"]: path for path, manifest in found.items() if manifest["step"] <= step}
    paths = list(saves.values())
    values = {path: found[path]["metrics"].get(monitor) for path in paths}
    rated = [path for path, value in values.items() if isinstance(value, (int, float))]
    in_order = sorted(rated, key=values.__getitem__, reverse=mode == "max") if monitor is not None else []
    best = in_order[:keep_best]  # of equals the older
    staying = {*paths[-keep_last:], *best}
    if every is not None:
        staying |= {path for at, path in saves.items() if at % every == 0}
    for link, path in [("last", saves[step]), *(("best", path) for path in best[:1])]:
        (directory / f".{link}").unlink(missing_ok=True)
        (directory / f".{link}").symlink_to(path.name)
        (directory / f".{link}").rename(directory / link)
    for path in found.keys() - staying:
        (path / "manifest.json").unlink()
        shutil.rmtree(path)


def plain_load_model(model: nn.Module, stored: Mapping[str, Tensor], extra: dict[str, Any], source: Path) -> None:
    """Load weights by name."""
    model.load_state_dict({**stored, **extra})


def plain_load_tensors(model: nn.Module, stored: Mapping[str, Tensor], extra: dict[str, Any], source: Path) -> None:
    """Load weights by name, of a model whose state is tensors alone."""
    model.load_state_dict(stored)


def plain_load_weights(model: nn.Module, source: str | Path, which: str = "best") -> Path:
    """Load the weights of a run, a checkpoint, or a safetensors file into a model, and return where they are from."""
    path = Path(source)
    path = (path / "checkpoints" / which).resolve() if (path / "checkpoints").is_dir() else path
    model.load_state_dict(load_file(path if path.is_file() else path / "model.safetensors"))
    return path


def plain_optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the state of each parameter, and the groups, both by name."""
    names, kept = names_of(optimizer, model), optimizer.state_dict()
    named_groups = [{**group, "params": [names[index] for index in group["params"]]} for group in kept["param_groups"]]
    return {"state": {names[index]: values for index, values in kept["state"].items()}, "groups": named_groups}


def plain_check_weights(model: nn.Module, step: int, ranks: Ranks | None) -> None:
    """Raise an error for a weight that became NaN or infinite though no loss has shown it yet."""
    for weight, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise FloatingPointError(f"{weight} is NaN or infinite after step {step}, which is not saved.")


def plain_encode(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Return a value as JSON; the tensors in it go into `tensors`, named by their path."""
    match value:
        case Tensor() | np.ndarray():
            tensors[path] = torch.as_tensor(value).detach()
            return {"$tensor": path}
        case dict() if all(isinstance(key, str) for key in value):
            return {key: plain_encode(item, tensors, f"{path}/{key}") for key, item in value.items()}
        case dict():
            return {"$dict": [[key, plain_encode(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
        case list() | tuple():
            items = [plain_encode(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        case float() if not math.isfinite(value):
            return {"$float": repr(value)}
    return value


def plain_decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `encode` was given."""
    match value:
        case list():
            return [plain_decode(item, tensors) for item in value]
        case {"$tensor": name}:
            return tensors[name]
        case {"$tuple": parts}:
            return tuple(plain_decode(parts, tensors))
        case {"$dict": pairs}:
            return dict(plain_decode(pairs, tensors))
        case {"$float": text}:
            return float(text)
        case dict():
            return {key: plain_decode(item, tensors) for key, item in value.items()}
    return value
