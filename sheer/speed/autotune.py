"""The preflight: ways to train, tried with the user's real step on this machine, checked, told in a table, and one of them chosen."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from sheer.build import build_optimizer, make_compute, place_model, resolve_device
from sheer.errors import SettingsError
from sheer.events import RunInfo
from sheer.float8 import CAPABILITY
from sheer.plugins import Plugins
from sheer.scripts import Call
from sheer.settings import MODES_WITH_GRAPHS, Settings
from sheer.speed.trials import Trial, trial_of
from sheer.speed.ways import PREFETCHED, Way, can_be, own_way

FILE = "autotune.json"
GAIN = 0.98  # of the time of the best so far: what is hardly faster is not kept
SAME, ROUNDED, REDRAWN = 1e-3, 2e-2, 5e-2  # how far losses may be from those of the script's own way, relative
BUDGETS = (0.8, 0.5)  # of the memory of activations: a good part of it costs next to no time, and half of it some
Say = Callable[[str], None]


class Keeper:
    """A callback that writes the way which was chosen into the folder of its run, where `resume` finds it."""

    def __init__(self, way: Way) -> None:
        self.way = way

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        """Write it."""
        path = info.run_dir / FILE
        path.write_text(json.dumps(dataclasses.asdict(self.way), indent=1))


def chosen_before(settings: Settings) -> Way | None:
    """Return the way that was chosen for the run that goes on; None in a new one."""
    given = settings.run_dir if settings.resume == "auto" else settings.resume
    if given is None:
        return None
    start = Path(given)
    found = next((folder / FILE for folder in (start, *start.parents[:2]) if (folder / FILE).is_file()), None)
    return Way(**json.loads(found.read_text())) if found is not None else None


def find_way(call: Call, say: Say = print) -> Way:
    """Try ways to train, print a table of them, and return the best.

    Each is a run of `fit` over a few dozen steps from the same state. One is kept if it is at least 2% faster than the best so far, which is
    measured again behind it, and its losses are those of the script's own way: within 0.1%; within 2% in another precision; within 5%
    where a compiled dropout draws other numbers. Afterwards the model (on the device), the optimizer, the schedule and the random states are as they were.

    Args:
        call: what `fit` was given. Its callbacks are not called; one that looks at gradients rules out a graph.
        say: is given each line.

    Raises:
        SettingsError: there are several ranks, or the script's own way cannot be measured.
    """
    settings = call.settings
    if settings.parallel != "none":
        raise SettingsError(
            "autotune measures one process, and there are several ranks. Run `sheer autotune` on one, and set what it says."
        )
    device = resolve_device(settings.device)
    place_model(call.model, make_compute(settings.precision, device))
    say(f"autotune: each way for about two seconds on {device}, from the same state")
    say(f"{'ms a step':>10}  {'peak MiB':>9}  verified  way")
    base, tried = own_way(settings), set[Way]()
    best = fitting(call, base, device, say, tried)
    for candidates in (
        faster_optimizers,
        ways_to_execute,
        faster_optimizers,
        more_workers,
        more_ahead,
        lower_precisions,
        larger_parts,
        recomputation,
    ):
        for way in candidates(call, best, base, device):
            if way not in tried:
                tried.add(way)
                best = better(call, best, way, base, device, say)
    say(f"autotune: {best.way.differences(base)}")
    return best.way


def tuned(call: Call) -> tuple[Settings, Plugins, Any, Any]:
    """Return settings, plugins, loader and optimizer of a run in the way that is fastest, or that was when it began."""
    way = chosen_before(call.settings)
    if way is None:
        way = find_way(call)
    else:
        print(f"autotune: as when the run began: {way.differences(own_way(call.settings))}")
    plugins = dataclasses.replace(call.plugins, callbacks=[*call.plugins.callbacks, Keeper(way)])
    return way.settings(call.settings), plugins, way.loader(call.loader), way.optimizer(call.optimizer)


def fitting(call: Call, base: Way, device: torch.device, say: Say, tried: set[Way]) -> Trial:
    """Measure the script's own way; without a graph where none can be, in smaller and smaller micro-batches where memory does not suffice.

    Ways that were tried are put into `tried`.
    """
    way, words = base, "the script's own"
    while True:
        tried.add(way)
        trial = trial_of(call, way, device, is_own=True)
        tell(trial, words if trial.problem is None else f"{words}: {trial.problem}", say)
        size = way.micro_batch_size or batch_size_of(call)
        if trial.problem == "out of memory" and size > 1:
            way = dataclasses.replace(way, micro_batch_size=size // 2)
        elif trial.problem is not None and way.cuda_graph:
            way = dataclasses.replace(way, cuda_graph=False)
        elif trial.problem is not None:
            raise SettingsError(f"autotune cannot measure this training: {trial.problem.removesuffix('.')}.")
        else:
            return trial
        words = way.differences(base)


def batch_size_of(call: Call) -> int:
    """Return the samples of a batch of the loader, where it says; else 1."""
    return getattr(call.loader, "batch_size", None) or 1


def better(call: Call, best: Trial, way: Way, base: Way, device: torch.device, say: Say) -> Trial:
    """Measure a way, say what came of it, and return it or the best so far.

    One that was faster is compared once more, with the best so far measured behind it: the machine may have become another.
    """
    trial = trial_of(call, way, device)
    off = 0.0 if trial.problem else distance(trial.losses, best.losses)
    bound, first = bound_of(call, way, base), best.ms
    if trial.problem is None and off <= bound and trial.ms <= GAIN * first:
        best = measured_again(call, best, device)
    if trial.problem is not None:
        verdict = f"dropped: {trial.problem}"
    elif not off <= bound:
        verdict = f"dropped: its losses are {off:.1%} off"
    elif trial.ms <= GAIN * best.ms:
        verdict = "kept"
    elif trial.ms <= GAIN * first:
        verdict = f"dropped: the best so far took {best.ms:.3f} ms behind it"
    else:
        verdict = "dropped: slower" if trial.ms > best.ms else "dropped: hardly faster"
    tell(trial, f"{way.differences(base)}: {verdict}", say, verified="yes" if off <= bound else "no")
    # What is compared with stays the script's own: small differences do not add up.
    return dataclasses.replace(trial, losses=best.losses) if verdict == "kept" else best


def measured_again(call: Call, best: Trial, device: torch.device) -> Trial:
    """Return a trial with the shorter of two times: its own, and that of another of the same way now."""
    again = trial_of(call, best.way, device)
    return best if again.problem is not None else dataclasses.replace(best, ms=min(best.ms, again.ms))


def tell(trial: Trial, words: str, say: Say, verified: str = "-") -> None:
    """Say a line of the table; `verified` is whether its losses are those of the script's own way."""
    ms = f"{trial.ms:10.3f}" if trial.problem is None else f"{'-':>10}"
    peak = f"{trial.peak / 2**20:9.0f}" if trial.peak else f"{'-':>9}"
    verified = verified if trial.problem is None else "-"
    say(f"{ms}  {peak}  {verified:8}  {words}")


def distance(losses: Sequence[float], others: Sequence[float]) -> float:
    """Return how far losses are from others, relative, at most."""
    if not all(math.isfinite(loss) for loss in losses):
        return math.inf
    return max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(losses, others, strict=True))


def bound_of(call: Call, way: Way, base: Way) -> float:
    """Return how far the losses of a way may be from those of the script's own."""
    drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in call.model.modules())
    if drops and way.compile != base.compile:
        return REDRAWN
    return ROUNDED if way.precision != base.precision else SAME


def faster_optimizers(call: Call, best: Trial, base: Way, device: torch.device) -> list[Way]:
    """Return the fused optimizer, and the foreach one where it is no default, if the script does not say otherwise.

    They are tried again where a graph hides less.
    """
    if best.way.fused or best.way.foreach:
        return []
    optimizer = build_optimizer(call.model, call.optimizer)
    ways = [dataclasses.replace(best.way, fused=True)] if can_be("fused", optimizer) else []
    if device.type != "cuda" and can_be("foreach", optimizer):
        ways.append(dataclasses.replace(best.way, foreach=True))
    return ways


def ways_to_execute(call: Call, best: Trial, base: Way, device: torch.device) -> list[Way]:
    """Return compiled, captured, and both."""
    ways = [] if base.compile else [dataclasses.replace(best.way, compile=True)]
    looks = any(hasattr(callback, "on_gradients") for callback in call.plugins.callbacks)
    if device.type == "cuda" and not looks:
        modes = [base.compile] if base.compile else [False, True]
        ways += [
            dataclasses.replace(best.way, compile=mode, cuda_graph=True)
            for mode in modes
            if mode not in MODES_WITH_GRAPHS
        ]
    return ways


def more_workers(call: Call, best: Trial, base: Way, device: torch.device) -> list[Way]:
    """Return numbers of worker processes: some for a loader that reads in this one; none, and twice as many, for one that has some."""
    if type(call.loader) is not DataLoader:
        return []
    given, most = call.loader.num_workers, os.cpu_count() or 1
    numbers = [1, 4, 8] if not given else [2 * given] if call.loader.persistent_workers else [0, 2 * given]
    return [dataclasses.replace(best.way, num_workers=number) for number in numbers if number <= most]


def more_ahead(call: Call, best: Trial, base: Way, device: torch.device) -> list[Way]:
    """Return worker processes that are further ahead, for a loader that has some and no number of its own."""
    if type(call.loader) is not DataLoader:
        return []
    workers, given = best.way.num_workers, call.loader.prefetch_factor
    if not (call.loader.num_workers if workers is None else workers):
        return []
    return [dataclasses.replace(best.way, prefetch_factor=8)] if given in (None, PREFETCHED) else []


def lower_precisions(call: Call, best: Trial, base: Way, device: torch.device) -> list[Way]:
    """Return TF32 and bf16 for a run in 32 bits, and float8 for one in bf16, on a GPU that has them."""
    if device.type != "cuda" or not torch.cuda.is_bf16_supported():
        return []
    if base.precision == "32-true":
        return [dataclasses.replace(best.way, precision=precision) for precision in ("tf32-true", "bf16-mixed")]
    can = torch.cuda.get_device_capability(device) >= CAPABILITY and importlib.util.find_spec("torchao") is not None
    return [dataclasses.replace(best.way, precision="float8-mixed")] if can and base.precision == "bf16-mixed" else []


def larger_parts(call: Call, best: Trial, base: Way, device: torch.device) -> list[Way]:
    """Return larger micro-batches, where the script's batches are divided: what was chosen may leave memory for them."""
    size = best.way.micro_batch_size
    if size is None:
        return []
    sizes = [size * factor for factor in (2, 4) if size * factor < batch_size_of(call)]
    return [dataclasses.replace(best.way, micro_batch_size=larger) for larger in (*sizes, None)]


def recomputation(call: Call, best: Trial, base: Way, device: torch.device) -> list[Way]:
    """Return twice the micro-batch with less of what is computed kept for the backward pass, where the model is compiled."""
    size, whole = best.way.micro_batch_size, batch_size_of(call)
    if size is None or not best.way.compile or best.way.activation_memory_budget < 1.0:
        return []
    larger = size * 2 if size * 2 < whole else None
    return [
        dataclasses.replace(best.way, micro_batch_size=larger, activation_memory_budget=budget) for budget in BUDGETS
    ]
