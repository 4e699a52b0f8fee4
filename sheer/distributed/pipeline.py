"""Pipeline parallelism: ranks hold stages of the model, and micro-batches travel through them, by PyTorch's own schedules.

The user's step is the one written for a single process. It is run with a stand-in for the model: on every rank up to its call of the
model, to learn what goes into the stages; and on the last stage as the loss function, with a stand-in that answers with what came out.
Both runs of a micro-batch draw the same random numbers. All ranks of a pipeline get the same batch.

Tensors that travel between stages are floating. Their shapes are found by trying the stages once, before the first step and wherever
the batch changes. PyTorch (2.13) would find them by itself, but would call the loss function too, on uninitialised memory, so that a
metric that keeps a state would count it, and the averages of a batch norm; here, buffers are put back.

On 2.11, the schedules that go down the ranks and back (ZBVZeroBubble, DualPipeV) fail on the CPU, where no rank can send to itself, and
those that cut the backward in two (these, and InterleavedZeroBubble) fail in compiled modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from sheer.distributed.stages import DOWN_AND_BACK, stages_of_rank
from sheer.distributed.stand_in import ModelCall, answered, detached, drawing_alike, recorded_call, refuse_unequal
from sheer.distributed.trial import Sketch, misuse_in, refuse_together, try_stages, what_differs
from sheer.errors import ModelError, SettingsError, StepError
from sheer.loss import Step, loss_in, no_loss
from sheer.metrics import Mean

_MOST_PREPARED = (
    4  # schedules that are kept with their buffers: for training, for evaluation, and for a last batch of each
)
# Those whose backward comes in two halves: for what goes on to the stage before, and for the weights.
_SPLITTING = (*DOWN_AND_BACK, ScheduleInterleavedZeroBubble)


@dataclass
class PipelineWork:
    """What one run of a step over the stages is made of."""

    step_function: Step
    batches: list[Any]
    seed: int
    more: tuple[Any, ...]
    weights: list[float] | None = None  # None: forward only
    mean_weight: float = 1.0
    outputs: list[Any] = field(default_factory=list)


class _CallStage(PipelineStage):
    """A stage that is called as the step calls the model: the first with its arguments, all with its keywords."""

    calls: Sequence[ModelCall] = ()
    autocast: AbstractContextManager[Any] = nullcontext()

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: tuple[Any, ...], kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        """Run the stage on one micro-batch."""
        call = self.calls[fwd_chunk_id]
        with self.autocast:
            return super().forward_one_chunk(fwd_chunk_id, call.arguments, call.keywords, save_forward_output)


class PipelineStep:
    """Runs steps over the stages of a pipeline, forward and backward or forward alone.

    Args:
        stages: the stages that this rank holds, by their index, on their device; sharded (the stage itself too) or compiled.
        number: how many stages there are on all ranks.
        group: the ranks of the pipeline.
        schedule: "GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", or another of PyTorch's.
        device: where this rank computes.
        autocast: entered around the step and each stage.
        any_of_copies: whether any pipeline says so, where several share sharded parameters: they try their stages together.
        uncut: a copy of the model before it was cut, on one rank; its stages are compared with it before the first step, then it goes.
        split: the names of the modules at which it was cut.

    Raises:
        SettingsError: the schedule does not fit the numbers of ranks and stages.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        number: int,
        group: ProcessGroup,
        schedule: str,
        device: torch.device,
        autocast: AbstractContextManager[Any] | None = None,
        any_of_copies: Callable[[bool], bool] | None = None,
        uncut: nn.Module | None = None,
        split: Sequence[str] = (),
    ) -> None:
        size = dist.get_world_size(group)
        self.rank_of = {s: rank for rank in range(size) for s in stages_of_rank(schedule, rank, size, number)}
        wanted = [index for index, rank in self.rank_of.items() if rank == dist.get_rank(group)]
        assert sorted(stages) == wanted, f"{schedule} has stages {wanted} on this rank, not {sorted(stages)}"
        self.stages, self.number, self.group, self.schedule, self.device = dict(stages), number, group, schedule, device
        self.autocast = nullcontext() if autocast is None else autocast
        self._any_of_copies = any_of_copies
        self._uncut, self._split, self._is_compared = uncut, split, False
        self.last_rank = self.rank_of[number - 1]  # in the group: where outputs are returned
        self.is_last = number - 1 in self.stages
        self._prepared: dict[Any, tuple[Any, list[_CallStage], list[Sketch]]] = {}
        self._work: PipelineWork | None = None
        self._weighted: bool | None = None  # whether the loss is a Mean; None before the first step
        for index, module in self.stages.items():
            if index < number - 1:
                module.register_forward_hook(_own_outputs)
            sharded = any(isinstance(part, FSDPModule) for part in module.modules())
            assert isinstance(module, FSDPModule) or not sharded, "a stage with sharded parts is sharded itself"
            if isinstance(module, FSDPModule) and issubclass(get_schedule_class(schedule), _SPLITTING):
                module.set_reshard_after_forward(
                    False
                )  # else their second half finds no weights, and leaves gradients out

    def run(
        self,
        step_function: Step,
        parts: Sequence[tuple[Any, int]],
        weights: Sequence[float],
        mean_weight: float,
        seed: int,
        more: tuple[Any, ...] = (),
    ) -> list[Any] | None:
        """Run one step forward and backward; gradients are added to those that the parameters have.

        They are the sum over the micro-batches of weight x loss, or of `mean_weight` x total where the loss is a `Mean`.

        Args:
            step_function: the user's step.
            parts: the micro-batches, each with its number of samples, the same on all ranks of the pipeline.
            weights: of each micro-batch's loss: samples / samples of the whole step.
            mean_weight: of each total: 1 / samples of the whole step; `count_of` says what is left to do.
            seed: for what the step itself draws; the same on all ranks of the pipeline, another in each step.
            more: further arguments of the step (its number).

        Returns:
            What the step returned for each micro-batch, detached, on the rank of the last stage; None elsewhere.

        Raises:
            StepError: the step does not call the model exactly once, or returns no loss.
            DataError: the micro-batches have different shapes.
            ModelError: a stage cannot run.
        """
        batches = [batch for batch, _ in parts]
        return self._run(PipelineWork(step_function, batches, seed, more, list(weights), mean_weight))

    def evaluate(
        self, step_function: Step, parts: Sequence[tuple[Any, int]], seed: int, more: tuple[Any, ...] = ()
    ) -> list[Any] | None:
        """Run a step forward only, without gradients; arguments, results and errors are as in `run`.

        Whether the stages are in eval mode is the caller's affair.
        """
        with torch.no_grad():
            return self._run(PipelineWork(step_function, [batch for batch, _ in parts], seed, more))

    def count_of(self, outputs: list[Any] | None) -> Tensor | None:
        """Return, on every rank, the sum of the counts of a step's losses; None where losses are no `Mean`s. All ranks must call it.

        With N samples in the step and `mean_weight` 1 / N, the gradients are to be multiplied by N / count.
        """
        losses = [output["loss"] if isinstance(output, Mapping) else output for output in outputs or []]
        if self._weighted is None:
            told = [any(isinstance(loss, Mean) for loss in losses)]
            dist.broadcast_object_list(told, group=self.group, group_src=self.last_rank)
            self._weighted = told[0]
        if not self._weighted:
            return None
        count = torch.as_tensor(sum([loss.count for loss in losses]), dtype=torch.float32, device=self.device).clone()
        dist.broadcast(count, group=self.group, group_src=self.last_rank)
        return count

    def _run(self, job: PipelineWork) -> list[Any] | None:
        calls = []
        for index, batch in enumerate(job.batches):
            with self.autocast, drawing_alike(job.seed, index, self.device):
                calls.append(recorded_call(job.step_function, batch, job.more, self._training()))
        refuse_unequal(calls)
        key = (job.weights is None, len(calls), calls[0].shapes())
        unseen = key not in self._prepared
        if unseen if self._any_of_copies is None else self._any_of_copies(unseen):
            for old in list(self._prepared)[: -_MOST_PREPARED + 1]:
                del self._prepared[old]
            self._prepared[key] = self._prepare(job, calls)
        schedule, stages, sketches = self._prepared[key]
        job.outputs = [None] * len(calls)
        self._work = job
        for stage in stages:
            stage.calls = calls
        try:
            targets = torch.arange(len(calls))  # a target is the number of its micro-batch
            if job.weights is not None:
                schedule.step(target=targets, return_outputs=False)
            elif isinstance(schedule, DOWN_AND_BACK):
                self._down_and_back(calls, sketches)
            else:
                schedule.eval(target=targets, return_outputs=False)
        finally:
            self._work = None
            for stage in stages:
                stage.calls = ()
        return job.outputs if self.is_last else None

    def _down_and_back(self, calls: list[ModelCall], sketches: list[Sketch]) -> None:
        """Run the stages forward where each rank has two, in the schedules whose own `eval` fails (in 2.13)."""
        kept: dict[int, Any] = {}  # what one stage gives the next on the same rank
        sent = []
        for index, module in sorted(self.stages.items()):
            for number, call in enumerate(calls):
                taken: Any = call.arguments if index == 0 else kept.pop(number, None)
                if taken is None:
                    taken = [torch.empty_like(one, device=self.device) for one in sketches[index].tensors]
                    for one in taken:
                        dist.recv(one, group=self.group, group_src=self.rank_of[index - 1])
                with self.autocast:
                    given = module(*taken, **call.keywords)
                outputs = given if isinstance(given, tuple) else (given,)
                if index == self.number - 1:
                    self._loss_of(given, torch.tensor([number]))
                elif index + 1 in self.stages:
                    kept[number] = outputs
                else:
                    sent += [
                        (one, dist.isend(one, group=self.group, group_dst=self.rank_of[index + 1])) for one in outputs
                    ]
        for _, request in sent:
            if request is not None:
                request.wait()

    def _training(self) -> bool:
        return any(module.training for module in self.stages.values())

    def _loss_of(self, output: Any, target: Tensor) -> Any:
        """Run the step on what came out of the last stage, and return its loss with its weight."""
        job, index = self._work, int(target)
        assert job is not None
        with self.autocast, drawing_alike(job.seed, index, self.device):
            result = answered(job.step_function, job.batches[index], job.more, self._training(), output)
        job.outputs[index] = detached(result)
        if job.weights is None:
            return result
        loss = result if isinstance(result, (Tensor, Mean)) else loss_in(job.step_function, result)
        weight = job.mean_weight if isinstance(loss, Mean) else job.weights[index]
        value = loss.total if isinstance(loss, Mean) else loss
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise StepError(no_loss(job.step_function, result))
        return value * weight

    def _prepare(self, job: PipelineWork, calls: list[ModelCall]) -> tuple[Any, list[_CallStage], list[Sketch]]:
        """Make a schedule and its stages for the shapes of a step."""
        if not self._is_compared:
            refuse_together(what_differs(self._uncut, self._split, calls[0]), self.group, ModelError)
            self._uncut, self._is_compared = None, True
        sketches = try_stages(self.stages, self.rank_of, self.group, self.device, self.autocast, calls[0])
        misuse = None
        if not self.is_last:  # where the step really runs, metrics of its own would count this
            with self.autocast, drawing_alike(job.seed, 0, self.device):
                misuse = misuse_in(
                    job.step_function, job.batches[0], job.more, self._training(), sketches[-1], self.device
                )
        refuse_together(misuse, self.group)
        stages = []
        for index, module in sorted(self.stages.items()):
            takes, gives = sketches[index].tensors, sketches[index + 1].tensors
            stage = _CallStage(module, index, self.number, self.device, takes, gives, group=self.group)
            stage.autocast = self.autocast
            stages.append(stage)
        kind: Any = get_schedule_class(self.schedule)
        if job.weights is None:  # the same places of the stages, and no demands on the number of micro-batches
            down_and_back = issubclass(kind, DOWN_AND_BACK)
            looped = ScheduleZBVZeroBubble if down_and_back else ScheduleLoopedBFS
            kind = ScheduleGPipe if issubclass(kind, PipelineScheduleSingle) else looped
        given = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
        try:
            return kind(given, len(calls), loss_fn=self._loss_of, scale_grads=False), stages, sketches
        except ValueError as error:
            raise SettingsError(
                f"The schedule {self.schedule} cannot run {len(calls)} micro-batches a step over {self.number} stages: {error} Choose a "
                "micro_batch_size that makes as many micro-batches as there are stages, or a multiple."
            ) from error


def _own_outputs(module: nn.Module, arguments: Any, output: Any) -> Any:
    """Return a stage's outputs in memory of their own, as they must lie to be sent and, in some schedules, detached in place."""
    if isinstance(output, Tensor):
        return output.clone(memory_format=torch.contiguous_format) if output._is_view() else output.contiguous()
    return (
        tuple(_own_outputs(module, arguments, one) for one in output) if isinstance(output, (tuple, list)) else output
    )
