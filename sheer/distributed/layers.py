"""A run whose layers are divided over ranks: its pipeline, and what it asks of the data and of the settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sheer.data.batch import StepBatch, micro_batches
from sheer.data.order import mix_seed, share
from sheer.distributed.agree import any_rank, first_of, from_rank_zero
from sheer.distributed.gradients import mean_over_ranks
from sheer.distributed.mesh import Ranks
from sheer.distributed.wrap import Sharding, compile_unit, shard, units_of
from sheer.errors import DataError, SettingsError, StepError
from sheer.initialise import materialise
from sheer.loss import Step
from sheer.metrics import Computed, Mean, Metrics, detached_number
from sheer.nonfinite import Watch

if TYPE_CHECKING:
    from sheer.distributed.pipeline import PipelineStep


MOST_COMPARED = 200_000_000  # parameters of a model whose stages are compared with it


class Pipeline(nn.Module):
    """The stages of a model that this rank holds, and the steps over all of them."""

    def __init__(self, steps: PipelineStep, ranks: Ranks, model: nn.Module, shells: Sequence[str]) -> None:
        super().__init__()
        self.copies = [
            (stage.get_submodule(name), model.get_submodule(name)) for stage in steps.stages.values() for name in shells
        ]
        self.held = nn.ModuleList(steps.stages.values())
        self.seen = False  # whether what a step returns was looked at
        self.steps, self.ranks, self.seed = steps, ranks, from_rank_zero(torch.initial_seed())

    def backward(
        self,
        step_function: Step,
        batch: StepBatch,
        size: int | None,
        step: int,
        more: tuple[int, ...],
        metrics: Metrics,
        watch: Watch | None,
        prefix: str,
    ) -> tuple[Any, Tensor | float | None]:
        """Run a step forward and backward over the stages, and add what it returns to the metrics where the last stage is.

        Returns:
            what the step returned for the last micro-batch, there; and what the gradients are to be multiplied by, None for nothing.
        """
        self.take_modes()
        parts = self.cut(batch, size)
        total = batch.total / self.ranks.data_ranks
        weights = [samples / total for _, samples in parts]
        outputs = self.steps.run(step_function, parts, weights, 1 / total, mix_seed(self.seed, step), more)
        self.refuse_objects(outputs)
        for output, (_, samples) in zip(outputs or [], parts, strict=False):
            metrics.add(output, samples, prefix)
            if watch is not None:
                loss = output["loss"] if isinstance(output, Mapping) else output
                watch.add(
                    step, "loss", detached_number(torch.as_tensor(loss.total if isinstance(loss, Mean) else loss))
                )
        count = self.steps.count_of(outputs)
        factor = None if count is None else total / mean_over_ranks(count, self.ranks).clamp(min=1e-12)
        return (outputs[-1] if outputs else None), factor

    def cut(self, batch: StepBatch, size: int | None) -> list[tuple[Any, int]]:
        """Cut the batches of a step into the micro-batches of the pipeline, all of one size.

        Raises:
            DataError: they cannot be.
        """
        number = number_of_micro_batches(self.ranks)
        parts = []
        for part, samples in batch:
            own = size or -(-samples // number)
            if samples == 0 or samples % own or (size is None and samples % number):
                raise DataError(
                    f"A pipeline needs micro-batches of one size, and a rank has {samples} samples of a batch"
                    + (f", which micro_batch_size={size} does not divide." if size else f" for {number} micro-batches.")
                    + " Choose a batch_size that divides (over the data ranks, then pp_micro_batches), and drop_last=True."
                )
            parts += list(micro_batches([(part, samples)], own))
        return parts

    def evaluate(self, step_function: Step, batch: Any, more: tuple[int, ...]) -> Any:
        """Run a step forward over the stages; returns what it returned where the last stage is, None elsewhere."""
        self.take_modes()
        outputs = self.steps.evaluate(step_function, [(batch, 1)], self.seed, more)
        self.refuse_objects(outputs)
        return outputs[0] if outputs else None

    def take_modes(self) -> None:
        """Put what of the stages is a copy into the mode, train or eval, of what of the model it is a copy of; the rest is the model's own."""
        for twin, module in self.copies:
            twin.training = module.training

    def refuse_objects(self, outputs: list[Any] | None) -> None:
        """Raise `StepError`, on all ranks, if the first step that is seen returns metric objects, which only the last stage would have."""
        if self.seen:
            return
        self.seen = True
        output = outputs[0] if outputs else {}
        returned = output.items() if isinstance(output, Mapping) else ()
        objects = [name for name, value in returned if isinstance(value, Computed) and not isinstance(value, Tensor)]
        found = first_of(self.ranks, objects[0] if objects else None)
        if found is not None:
            raise StepError(
                f"The step returned {found!r} as an object that puts its own state together over all ranks; with pp > 1 only the last stage has "
                "any. Return a number, or a sheer.Mean."
            )


def make_pipeline(
    model: nn.Module, ranks: Ranks, sharding: Sharding, autocast: AbstractContextManager[Any]
) -> Pipeline:
    """Divide a model's layers over ranks: the model keeps those of this rank, each stage of which is sharded as the settings say.

    Raises:
        SettingsError, ModelError: it cannot be divided so.
    """
    from sheer.distributed.pipeline import PipelineStep  # PyTorch's pipelining takes seconds to import
    from sheer.distributed.stages import copied_modules, keep_only, split_model, stages_of_rank

    parallel = ranks.parallel
    if sharding.precision == "16-mixed":
        raise SettingsError('precision="16-mixed" needs one scale for all stages, and pp has none. Set "bf16-mixed".')
    number, split = len(parallel.pp_split) + 1, parallel.pp_split
    own = stages_of_rank(parallel.pp_schedule, ranks.place("pp"), parallel.pp, number)
    uncut = copy_to_compare(model) if 0 in own and parallel.cp == 1 else None
    stages = dict(zip(own, split_model(model, split, own), strict=True))
    shells = copied_modules(model, split)
    keep_only(model, split, own)
    for stage in stages.values():
        if ranks.averaged * parallel.tp > 1:
            shard(stage, stage, ranks, sharding)
        else:
            materialise(stage, ranks.device)
            stage.to(ranks.device, sharding.dtype)
            for unit in (units_of(stage, parallel) or [stage]) if sharding.compile_mode else ():
                compile_unit(unit, sharding.compile_mode)
    any_of_copies = any_rank if ranks.averaged > 1 else None
    group, schedule, device = ranks.group("pp"), parallel.pp_schedule, ranks.device
    steps = PipelineStep(
        stages, number, group, schedule, device, autocast, any_of_copies=any_of_copies, uncut=uncut, split=split
    )
    return Pipeline(steps, ranks, model, shells)


def copy_to_compare(model: nn.Module) -> nn.Module | None:
    """Return a copy of a model that is to be cut into stages, which are compared with it before the first step.

    None where that would take long, or cannot be: for more parameters than a host computes with in seconds, and for those without values yet.
    """
    parameters = list(model.parameters())
    if sum(p.numel() for p in parameters) > MOST_COMPARED or any(p.is_meta for p in parameters):
        return None
    try:
        return copy.deepcopy(model)
    except Exception:  # a model may hold what cannot be copied
        return None


def number_of_micro_batches(ranks: Ranks) -> int:
    """Return into how many micro-batches a batch is cut, where the settings do not say how large they are."""
    return ranks.parallel.pp_micro_batches or 2 * ranks.parallel.pp


def check_sizes(batch_size: int | None, samples: int, size: int | None, ranks: Ranks) -> None:
    """Raise `DataError` at the start where a batch of known size cannot be cut into equal micro-batches.

    Args:
        batch_size: of the loader; None where it is not known.
        samples: of an epoch.
        size: `micro_batch_size`.
        ranks: the pipeline's.
    """
    if batch_size is None:
        return
    number = number_of_micro_batches(ranks)
    for total, which in ((batch_size, "a batch"), (samples % batch_size, "the last batch of an epoch")):
        shares = {share(total, rank, ranks.data_ranks)[1] for rank in range(ranks.data_ranks)}
        fits = len(shares) == 1 and all(own % (size or number) == 0 for own in shares)
        if total and not fits:
            raise DataError(
                f"A pipeline needs micro-batches of one size, and {which} of {total} samples on {ranks.data_ranks} data ranks does not divide into "
                + (f"micro-batches of {size}." if size else f"{number} micro-batches each.")
                + (" Set drop_last=True on the loader." if which != "a batch" else " Choose another batch_size.")
            )
