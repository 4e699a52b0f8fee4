"""Options of dividing a run that no other test has: all tried in one start of two ranks, each against one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import sheer
import sheer.session
from tests.distributed.features import cosine
from tests.distributed.task import CLASSES, FEATURES, Block, Net, assert_same, tensor_plan, train
from tests.ranks import run_on_ranks

STAGES = ("blocks.0", "blocks.1", "head")


class Sometimes(Net):
    """Has a layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(4, 4)


class Sequences(nn.Module):
    """Takes each sample as a sequence of four."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(FEATURES // 4, 16), Block(), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.embed(x.unflatten(-1, (4, -1)))))
        return out.mean(1)


def sequence_plan() -> dict[str, Any]:
    """Norms, and what is added up between layers, are divided along the sequence."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    return {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "block.norm": SequenceParallel(),
        "block.up": ColwiseParallel(input_layouts=Shard(1)),
        "block.down": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


def compiled(parallel: Any, plan: Any, folder: str) -> dict[str, Any]:
    """Train a compiled model, by the compiler's front end alone: what it makes of a graph takes long, and is not asked for here."""
    before, graphs = nn.Module.compile, []

    def front_end(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    nn.Module.compile = functools.partialmethod(before, backend=front_end)  # type: ignore[method-assign, assignment]
    try:
        found = train(parallel, plan=plan, folder=folder, compile=True, max_steps=9)
    finally:
        nn.Module.compile = before  # type: ignore[method-assign]
    assert graphs, "nothing was compiled"
    return found


PIPELINE = {"pp": 2, "pp_split": STAGES, "pp_micro_batches": 4}
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "find_unused_parameters": (
        sheer.Parallel(dp_replicate=-1, dp_shard=1, find_unused_parameters=True), {"make": Sometimes},
    ),
    "cpu_offload": (sheer.Parallel(cpu_offload=True), {"gradient_clip_val": 0.5}),
    "shard_modules": (sheer.Parallel(shard_modules=("Block", "LayerNorm"), reshard_after_forward=False), {}),
    "sequence parallel": (sheer.Parallel(tp=2), {"make": Sequences, "plan": sequence_plan, "gradient_clip_val": 0.5}),
    "Interleaved1F1B": (sheer.Parallel(**PIPELINE, pp_schedule="Interleaved1F1B"), {"scheduler": cosine}),
    "ZBVZeroBubble": (sheer.Parallel(**PIPELINE, pp_schedule="ZBVZeroBubble"), {"scheduler": cosine}),
}  # fmt: skip
COMPILED: dict[str, tuple[Any, Any]] = {
    "compiled, DDP": ("ddp", None),
    "compiled, FSDP2": ("fsdp", None),
    "compiled, TP": (sheer.Parallel(tp=2), tensor_plan),
    "compiled, PP": (sheer.Parallel(pp=2, pp_split=("blocks.1",), pp_micro_batches=4), None),
}
IN_16_BITS = "gradients summed in bfloat16"


def run(name: str, on_ranks: bool) -> dict[str, Any]:
    folder = f"{'many' if on_ranks else 'one'}/{name}"
    if name in COMPILED:
        parallel, plan = COMPILED[name]
        return compiled(parallel, plan() if plan else None, folder) if on_ranks else compiled("auto", None, folder)
    if name == IN_16_BITS:
        how: Any = sheer.Parallel(reduce_dtype="bfloat16") if on_ranks else "auto"
        return train(how, folder=folder, max_steps=9, precision="32-true", optimizer=SGD)
    parallel, options = OPTIONS[name]
    plan = options.get("plan")
    own = {**options, "plan": plan() if plan is not None and on_ranks else None}
    return train(parallel if on_ranks else "auto", folder=folder, max_steps=9, **own)


def run_all() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (*OPTIONS, *COMPILED, IN_16_BITS):
        try:
            found[name] = run(name, on_ranks=True)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def in_order() -> list[str]:
    """Make a folder by rank 0, which the other finds."""
    with sheer.rank_zero_first():
        seen = [path.name for path in Path.cwd().iterdir()]
        Path("made").mkdir(exist_ok=True)
    return seen


@functools.cache
def on_ranks() -> list[dict[str, Any]]:
    return run_on_ranks(2, run_all, timeout=300)


@pytest.mark.xdist_group("options")
@pytest.mark.filterwarnings("ignore:The loss of step 1 gave no gradient")
@pytest.mark.parametrize("name", [*OPTIONS, *COMPILED])
def test_an_option_leaves_the_run_what_it_is_on_one_process(name: str) -> None:
    many = [result[name] for result in on_ranks()]
    one = run(name, on_ranks=False)
    for result in many:
        assert not isinstance(result, str), result
        assert_same(one, result, logged=1e-10, weights=1e-8)


@pytest.mark.xdist_group("options")
def test_gradients_are_summed_in_the_precision_that_is_asked_for() -> None:
    one = run(IN_16_BITS, on_ranks=False)["weights"]
    for result in on_ranks():
        many = result[IN_16_BITS]["weights"]
        off = max(float((many[name] - value).abs().max() / value.abs().max()) for name, value in one.items())
        assert all(value.dtype == torch.float32 for value in many.values())
        assert 1e-5 < off < 1e-2, off


def test_rank_zero_goes_first() -> None:
    assert run_on_ranks(2, in_order) == [[], ["made"]]


def tell_nobody(error: BaseException, agreement: Any) -> None:
    pass


def not_reached() -> None:
    sheer.session.tell_other_ranks = tell_nobody  # both come here, and none is to end by the other's error
    with pytest.raises(Exception, match=r"find_unused_parameters=True"):
        train("ddp", make=Sometimes, max_steps=3)


def test_a_loss_that_does_not_reach_every_parameter_is_told_of_the_option() -> None:
    run_on_ranks(2, not_reached)
