"""What the tests of mistakes share: a fit whose steps are counted, and the hash of a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import sheer
from tests.task import loader, model, step, trainer

FIT_NAMES = ("val_loader", "eval_step", "scheduler", "resume_by_skipping")


class Updates:
    """Counts the steps that any optimizer takes."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        self.taken += 1


def fit(
    step: Any = step, loader: Any = None, *, net: Any = None, optimizer: Any = None, **options: Any
) -> sheer.Result:
    """Fit the small task; what is not given is right. Options are those of `fit` and of `Trainer`."""
    net = model() if net is None else net
    given = {name: options.pop(name) for name in FIT_NAMES if name in options}
    if optimizer is None:
        optimizer = AdamW(net.parameters(), lr=1e-2)
    return trainer(**options).fit(net, step, training() if loader is None else loader, optimizer=optimizer, **given)


def training() -> Any:
    return loader()


def refused(error: type[sheer.SheerError], *words: str, updates: int | None = 0, **how: Any) -> str:
    """Fit with a mistake in it: it is refused by `error`, whose message has all of `words`, after so many updates."""
    counter = Updates()
    handle = register_optimizer_step_pre_hook(counter)
    try:
        with pytest.raises(error) as caught:
            fit(**how)
    finally:
        handle.remove()
    if updates is not None:
        assert counter.taken == updates, f"{counter.taken} updates were made before the mistake was found"
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    return message


def contents(folder: str | Path) -> dict[str, str]:
    """Return the hash of each file below a folder, and where each link points."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def finished_run(folder: str = "run", **options: Any) -> dict[str, str]:
    """Make a run of a few steps that is whole on disk; return what is in its folder."""
    options = {"max_steps": 4, "checkpoint": sheer.Checkpoint(), **options}
    sheer.seed_everything(0)
    fit(run_dir=folder, **options)
    return contents(folder)


def linear(inputs: int = 6) -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(inputs, 1)
