"""A whole step as one CUDA graph: forward, backward, clip and update, captured once for each shape of batch and replayed.

The first steps are made as without graphs; they are steps of the run, and let libraries make what must not be made in a capture. A
graph holds what Python did when it was captured, so what would differ from step to step without being seen in tensors is refused:
the run says why, and goes on without graphs.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from sheer.data.batch import StepBatch
from sheer.errors import SheerWarning, user_level
from sheer.loss import Step
from sheer.random import random_state, set_random_state, snapshot
from sheer.run import Run
from sheer.settings import Settings
from sheer.speed.rates import DeviceRates
from sheer.speed.record import MOST_KEPT, CannotCaptureError, Recorder, Watching, leaves_of
from sheer.step import backward_of, clip_norm, clip_values, count_skipped, norm_of

WARM_UP = 3  # steps before the first capture
WARM_UP_ON_RANKS = 11  # DDP builds its buckets anew in the first, and times the next ten
MOST = 16  # graphs of a run


@dataclass(frozen=True)
class Captured:
    """One graph, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    recorder: Recorder


class Graphs:
    """The captured steps of a run.

    Attributes:
        captured: those there are, by the shapes of their batches; None for one that was seen once.
        told: what the last replay has written into, and nobody has read yet.
    """

    def __init__(self, run: Run, optimizer: Optimizer, warm_up: int) -> None:
        self.run, self.warm_up, self.made = run, warm_up, 0
        self.captured: dict[Any, Captured | None] = {}
        self.told: Recorder | None = None
        self.rates = DeviceRates(optimizer, run.compute.device)
        self.pool = torch.cuda.graph_pool_handle()

    def give_up(self, reason: str) -> None:
        """Go on without graphs, and say why."""
        self.run.graphless = reason
        self.captured = {}
        self.rates.release()
        warnings.warn(f"cuda_graph: steps go on without a graph, for {reason}.", SheerWarning, stacklevel=user_level())

    def close(self) -> None:
        """Free the graphs, and leave the optimizer as it was."""
        self.captured, self.told = {}, None
        if self.run.graphless is None:
            self.rates.release()

    def settle(self) -> None:
        """Add what replays have computed to the metrics of the run; nothing waits."""
        if self.told is not None:
            self.told.tell(self.run.metrics, self.run.watch)
            self.told = None


def graphs_of(cfg: Settings, run: Run, optimizer: Optimizer, numbered: bool) -> Graphs | None:
    """Return what captures the steps of a run, and say so; None where they cannot be captured, which is said too."""
    run.graphless = why_not(cfg, run, optimizer, numbered)
    if run.graphless is not None:
        run.console.say(f"cuda_graph: steps are made without a graph, for {run.graphless}")
        return None
    warm_up = WARM_UP if run.ranks is None else WARM_UP_ON_RANKS
    run.console.say(
        f"cuda_graph: each step is one graph after {warm_up} without; Python in the step function runs only when a graph is captured"
    )
    return Graphs(run, optimizer, warm_up)


def why_not(cfg: Settings, run: Run, optimizer: Optimizer, numbered: bool) -> str | None:
    """Return why the steps of a run cannot be captured, if that is known before."""
    if run.compute.device.type != "cuda":
        return "there is no CUDA device"
    if run.ranks is not None and not (run.ranks.uses_ddp and run.ranks.parallel.cp == run.ranks.parallel.pp == 1):
        return "the model is divided over ranks, and only DDP can be captured"
    if numbered:
        return "the step function takes the step's number, which a graph would keep"
    if run.events.gradients:
        return f"{type(run.events.gradients[0]).__name__} looks at the gradients of each step (on_gradients)"
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if (cfg.nonfinite == "skip" or run.scaler is not None) and not fused:
        return 'only a fused optimizer can leave out an update on the device, which nonfinite="skip" and "16-mixed" need: set fused=True'
    return None


def made_by_graph(
    cfg: Settings, run: Run, step_function: Step, batch: StepBatch, optimizer: Optimizer, scheduler: Any
) -> bool:
    """Make a step by the graph for such a batch; where there is none, return False: the step is to be made without.

    A graph is captured when a batch like one before comes again.
    """
    graphs, inputs = run.graphs, list[Tensor]()
    if graphs is None or run.graphless is not None:
        return False
    captured = graph_for(cfg, run, graphs, step_function, batch, optimizer, inputs)
    if captured is None:
        graphs.settle()
        return False
    recorder = captured.recorder
    if graphs.told is not recorder or len(recorder.steps) == MOST_KEPT:
        graphs.settle()
        graphs.told = recorder
    recorder.steps.append(run.progress.step)
    torch._foreach_copy_(captured.inputs, inputs, non_blocking=True)
    graphs.rates.bring()
    captured.graph.replay()
    if scheduler is not None and cfg.scheduler_interval == "step":
        scheduler.step()
    for updated in run.events.update:
        updated.on_update(run.progress.step, run.model)
    return True


def graph_for(
    cfg: Settings,
    run: Run,
    graphs: Graphs,
    step_function: Step,
    batch: StepBatch,
    optimizer: Optimizer,
    inputs: list[Tensor],
) -> Captured | None:
    """Return the graph for a batch, whose tensors are put into `inputs`; None where this step is to be made without."""
    try:
        shapes: list[Any] = [batch.total, *batch.largest]
        leaves_of(batch, inputs, shapes)
        key = tuple(shapes)
        captured = graphs.captured.get(key)
        if captured is None and graphs.made >= graphs.warm_up and key in graphs.captured:
            captured = graphs.captured[key] = capture(cfg, run, graphs, step_function, batch, optimizer)
        elif captured is None:
            graphs.made += 1
            if key not in graphs.captured and len(graphs.captured) == MOST:
                raise CannotCaptureError(f"batches come in more than {MOST} shapes (pad them, or group them by length)")
            graphs.captured[key] = None
        elif (changed := graphs.rates.changed_option()) is not None:
            raise CannotCaptureError(changed)
    except (CannotCaptureError, torch.OutOfMemoryError) as error:
        graphs.give_up(reason_of(error))
        return None
    return captured


def capture(
    cfg: Settings, run: Run, graphs: Graphs, step_function: Step, batch: StepBatch, optimizer: Optimizer
) -> Captured:
    """Capture a step on a copy of a batch. Nothing is computed; the first replay does.

    Raises:
        CannotCaptureError: it cannot be captured; the run is as it was.
    """
    held, device = batch.holding(copy.deepcopy(list(batch))), run.compute.device
    recorder, graph, taken = Recorder(device), torch.cuda.CUDAGraph(), snapshot()
    stream = None if run.ranks is None else torch.cuda.current_stream()
    metrics, watch = run.metrics, run.watch
    graphs.rates.bring()
    try:
        run.metrics, run.watch = cast(Any, recorder), cast(Any, Watching(recorder))
        with torch.cuda.graph(graph, pool=graphs.pool, stream=stream, capture_error_mode="thread_local"):
            backward_of(run)(cfg, run, step_function, False, held)
            update_on_device(cfg, run, optimizer, recorder)
            recorder.seal()
        refuse_host_randomness(taken)
    except (RuntimeError, CannotCaptureError) as error:
        clear(run)
        set_random_state(random_state(taken))
        raise CannotCaptureError(reason_of(error)) from error
    finally:
        run.metrics, run.watch = metrics, watch
    graphs.rates.hold_options()
    inputs: list[Tensor] = []
    leaves_of(held, inputs, [])
    return Captured(graph, inputs, recorder)


def refuse_host_randomness(before: tuple[Any, Any, Any, Any]) -> None:
    """Raise `CannotCaptureError` where the generators on the host are not as they were."""
    (python, numpy, default, _), (python_now, numpy_now, default_now, _) = before, snapshot()
    same = [numpy[0] == numpy_now[0], *(np.array_equal(a, b) for a, b in zip(numpy[1:], numpy_now[1:], strict=True))]
    if python != python_now or not all(same) or not torch.equal(default, default_now):
        raise CannotCaptureError("the step draws random numbers on the host, which a graph would keep")


def update_on_device(cfg: Settings, run: Run, optimizer: Optimizer, recorder: Recorder) -> None:
    """Clip and update as `apply` does, but for whether an update is left out: the device decides that, and it is read later."""
    parameters = run.parameters[optimizer]
    if run.scaler is not None:
        run.scaler.unscale_(optimizer)
    may_skip = cfg.nonfinite == "skip" or run.scaler is not None
    if may_skip or (cfg.gradient_clip_val is not None and cfg.gradient_clip_algorithm == "norm"):
        norm = norm_of(run, parameters)
    if may_skip:
        bad = ~norm.isfinite()
        recorder.add_skipped(bad)
    if cfg.gradient_clip_val is not None and cfg.gradient_clip_algorithm == "norm":
        clip_norm(cfg, run, parameters, cfg.gradient_clip_val, norm)
    if cfg.gradient_clip_val is not None and cfg.gradient_clip_algorithm == "value":
        clip_values(cfg.gradient_clip_val, run, parameters)
    if run.scaler is not None:
        run.scaler.step(optimizer)
        run.scaler.update()
    elif cfg.nonfinite == "skip":
        step_unless(optimizer, bad)
    else:
        optimizer.step()
    optimizer.zero_grad()


def settle_graphs(run: Run) -> None:
    """Bring the metrics and the counts of skipped steps to where replayed steps have brought the device. Waits for it where it may skip."""
    if run.graphs is None:
        return
    run.graphs.settle()
    for step in run.watch.take_skips():
        count_skipped(run, step)
    if run.scaler is not None:
        run.progress.scale = run.scaler.get_scale()


def step_unless(optimizer: Any, bad: Tensor) -> None:
    """Update unless a flag on the device is set, by what a gradient scaler sets on fused optimizers (see torch/amp/grad_scaler.py)."""
    optimizer.grad_scale, optimizer.found_inf = None, bad.to(torch.float32)
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def clear(run: Run) -> None:
    """Undo on the host what a capture that failed has left there."""
    for parameter in run.model.parameters():
        parameter.grad = None
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # else the random generator believes that it is captured still
        torch.zeros(1, device=run.compute.device)
    if run.scaler is not None:  # it believes that it has unscaled gradients
        state = run.scaler.state_dict()
        run.scaler = torch.amp.GradScaler(run.compute.device.type)
        run.scaler.load_state_dict(state)


def reason_of(error: BaseException) -> str:
    """Say in a line why a capture failed: the first line of the error below all others, and where in the step it was."""
    while error.__context__ is not None and not isinstance(error, CannotCaptureError):
        error = error.__context__
    if isinstance(error, CannotCaptureError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the device has not enough memory for a graph, which keeps what its steps need"
    trace = error.__traceback__
    place = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "site-packages" not in file and not str(trace.tb_frame.f_globals.get("__name__")).startswith("sheer."):
            place = f" ({file.rsplit('/', 1)[-1]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"the step waits for the device, or does what a graph cannot hold: {str(error).splitlines()[0]}{place}"
