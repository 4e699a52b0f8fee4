"""A few steps of a user's run, measured, and everything put back as it was."""

from __future__ import annotations

import copy
import dataclasses
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sheer.build import built_by_function
from sheer.console import silent_console
from sheer.errors import SheerError
from sheer.loop import fit
from sheer.plugins import Plugins
from sheer.random import random_state, set_random_state
from sheer.run import Run
from sheer.scripts import Call
from sheer.settings import Settings, without_rollback
from sheer.speed.ways import Way

ROUND = 10  # steps between two log points: the first of a round is not measured, for the host waited before it
WARM_UP_ROUNDS = 2  # rounds before those that are measured; their losses are compared
MOST_ROUNDS = 30
SECONDS = 1.5  # measured, at least, unless there are that many rounds


@dataclass(frozen=True)
class Trial:
    """What came of a way."""

    way: Way
    ms: float = 0.0  # a step, median over rounds
    peak: float = 0.0  # bytes allocated at most; 0 where the device does not say
    losses: tuple[float, ...] = ()  # means over the first rounds
    problem: str | None = None  # why it cannot be used


class Stopwatch:
    """A callback that measures rounds of steps, and stops when it has enough."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.losses, self.rounds = device, list[float](), list[float]()
        self._began = 0.0

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the losses of the first rounds."""
        if len(self.losses) < WARM_UP_ROUNDS:
            self.losses.append(metrics["train/loss"])

    def on_step_end(self, step: int, model: nn.Module) -> str | None:
        """Measure a round; say when there are enough."""
        if step < WARM_UP_ROUNDS * ROUND or step % ROUND not in (0, ROUND - 1):
            return None
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        if step % ROUND == 0:
            self._began = now
            return None
        self.rounds.append(now - self._began)
        enough = len(self.rounds) >= 3 and sum(self.rounds) >= SECONDS
        return "measured" if enough or len(self.rounds) == MOST_ROUNDS else None


def trial_of(call: Call, way: Way, device: torch.device, is_own: bool = False) -> Trial:
    """Train a few steps in a way, and put everything back: weights, optimizer, random states. A loader that has a state has moved on.

    `is_own` says that it is the script's own way, whose errors are the script's, and raised.
    """
    watch = Stopwatch(device)
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    try:
        with undone(call, way), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a way is said in the table
            problem = problem_of(trained_in(call, way, watch))
    except torch.OutOfMemoryError:
        problem = "out of memory"
    except (SheerError, RuntimeError, ImportError) as error:
        if is_own:
            raise
        problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if problem is None and len(watch.rounds) < 3:
        problem = "the training ended before it could be measured"
    if problem is not None:
        return Trial(way, problem=problem)
    peak = torch.accelerator.max_memory_allocated(device) if device.type != "cpu" else 0
    ms = statistics.median(watch.rounds) / (ROUND - 1) * 1e3
    return Trial(way, ms, float(peak), tuple(watch.losses))


def trained_in(call: Call, way: Way, watch: Stopwatch) -> Run:
    """Train in a way until the watch has enough; nothing of it stays on the disk."""
    scheduler = call.scheduler if built_by_function(call.scheduler) else None  # an object counts steps it must not see
    loader, optimizer = way.loader(call.loader), way.optimizer(call.optimizer)
    with tempfile.TemporaryDirectory(prefix="sheer-autotune-", ignore_cleanup_errors=True) as folder:
        settings, plugins = settings_of_trial(way.settings(call.settings), folder), Plugins([watch], [silent_console()])
        return fit(settings, plugins, call.model, call.step, loader, None, call.step, optimizer, scheduler, None, False)


def problem_of(run: Run) -> str | None:
    """Return why a run was none of the way that was asked for; None: it was."""
    return "out of memory" if run.progress.micro_batch_size is not None else run.graphless


def settings_of_trial(settings: Settings, folder: str) -> Settings:
    """Return settings for a run that leaves nothing behind, until it is stopped."""
    return dataclasses.replace(
        settings,
        autotune=False,
        max_steps=(WARM_UP_ROUNDS + MOST_ROUNDS + 1) * ROUND,
        max_epochs=None,
        max_time=None,
        checkpoint=None,
        nonfinite=without_rollback(settings),
        resume=None,
        run_dir=str(Path(folder, "run")),
        monitor=None,
        monitor_mode="min",
        log_every_n_steps=ROUND,
        validate_every_n_steps=None,
        validate_first=False,
    )


@contextmanager
def undone(call: Call, way: Way) -> Iterator[None]:
    """Put back at its end what a trial has changed: the model, the optimizer if it was given as one, the random states, and TF32."""
    states, given = random_state(), call.optimizer if isinstance(call.optimizer, Optimizer) else None
    modules = [
        (module, module.training, dict(module.named_children()), module._compiled_call_impl)
        for module in call.model.modules()
    ]
    weights = {name: _on_host(value) for name, value in call.model.state_dict().items()}
    unsaved = [
        (module, name, value, _on_host(value))
        for path, module in call.model.named_modules()
        for name, value in module.named_buffers(recurse=False)
        if (f"{path}.{name}" if path else name) not in weights
    ]
    products = torch.get_float32_matmul_precision() if way.precision == "tf32-true" else None
    optimizer = copy.deepcopy(given.state_dict()) if given is not None else {}
    try:
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        for module, training, children, compiled in modules:
            module._compiled_call_impl = compiled  # what `Module.compile` sets; there is no public way back
            for name, child in children.items():  # float8 puts others in their place, over the same parameters
                setattr(module, name, child)
            module.training = training
        call.model.load_state_dict(weights)
        for module, name, buffer, value in unsaved:
            setattr(module, name, buffer.copy_(value))
        for parameter in call.model.parameters():
            parameter.grad = None
        if given is not None:
            way.switch(given, False)
            given.load_state_dict(optimizer)
        set_random_state(states)
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def _on_host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else copy.deepcopy(value)
