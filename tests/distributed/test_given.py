"""A mesh that the user made, and models that the user divided: the same run as on one process, or refused with the way out."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader

import sheer
from sheer.console import silent_console
from tests.distributed.task import Net, assert_same, data, step, tensor_plan, train
from tests.ranks import run_on_ranks


def mesh_of(**sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def on_two() -> list[dict[str, Any]]:
    pipeline = sheer.Parallel(mesh=mesh_of(pp=2), pp_split=("blocks.1",), pp_micro_batches=4)
    return [
        train(mesh_of(dp_replicate=2), folder="runs/a", gradient_clip_val=0.5, max_steps=8),
        train(mesh_of(dp_shard=2), folder="runs/b", gradient_clip_val=0.5, max_steps=8),
        train(mesh_of(tp=2), plan=tensor_plan(), folder="runs/c", gradient_clip_val=0.5, max_steps=8),
        train(pipeline, folder="runs/d", gradient_clip_val=0.5, max_steps=8),
    ]


def on_four() -> list[dict[str, Any]]:
    the_very_mesh()
    shards = sheer.Parallel(mesh=mesh_of(dp_shard=2, tp=2), reshard_after_forward=False)
    return [
        train(mesh_of(dp_replicate=2, dp_shard=2), folder="runs/a", gradient_clip_val=0.5, max_steps=8),
        train(shards, plan=tensor_plan(), folder="runs/b", gradient_clip_val=0.5, max_steps=8),
        train(
            mesh_of(dp_replicate=2, dp_shard=1, tp=2),
            plan=tensor_plan(),
            folder="runs/c",
            gradient_clip_val=0.5,
            max_steps=8,
        ),
    ]


@pytest.mark.parametrize(("ranks", "runs"), [(2, on_two), (4, on_four)])
def test_a_run_over_the_users_mesh_is_the_run_of_one_process(
    ranks: int, runs: Callable[[], list[dict[str, Any]]]
) -> None:
    one = train(gradient_clip_val=0.5, max_steps=8)
    for results in run_on_ranks(ranks, runs):
        for many in results:
            assert_same(one, many, logged=1e-10, weights=1e-8)


def the_very_mesh() -> None:
    """The function that divides a model gets the user's mesh."""
    mesh = mesh_of(dp_shard=2, tp=2)
    seen: list[object] = []

    def divided(model: nn.Module, given: Any) -> None:
        seen.append(given)

    train(mesh, plan=divided, max_steps=1, folder="runs/mesh")
    assert len(seen) == 1 and seen[0] is mesh


def tensor_parallel(mesh: DeviceMesh) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = Net().double()
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def sharded(mesh: DeviceMesh | None, model: nn.Module | None = None) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = Net().double() if model is None else model
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def divided_models() -> list[dict[str, Any]]:
    from torch.nn.parallel import DistributedDataParallel

    both, shards, copies = mesh_of(dp_shard=2, tp=2), mesh_of(dp_shard=4), mesh_of(dp_replicate=2, dp_shard=2)
    makes: list[tuple[Any, Callable[[], nn.Module]]] = [
        (both, lambda: tensor_parallel(both["tp"])),  # the rest is the run's to shard
        (both, lambda: sharded(both["dp_shard"], tensor_parallel(both["tp"]))),
        (shards, lambda: sharded(shards)),
        (copies, lambda: sharded(copies)),
        ("auto", lambda: sharded(None)),
        (mesh_of(dp_replicate=4), lambda: DistributedDataParallel(Net().double())),
    ]
    return [
        train(parallel, make=make, folder=f"runs/{number}", gradient_clip_val=0.5, micro_batch_size=3, max_steps=8)
        for number, (parallel, make) in enumerate(makes)
    ]


def test_a_model_that_its_user_divided_is_trained_as_it_is() -> None:
    one = train(gradient_clip_val=0.5, max_steps=8)
    for results in run_on_ranks(4, divided_models):
        for many in results:
            many["weights"] = {name.removeprefix("module."): value for name, value in many["weights"].items()}
            assert_same(one, many, logged=1e-10, weights=1e-8)


def evaluated() -> tuple[dict[str, float], int]:
    """Five batches on two ranks: one has a batch more, and all must gather parameters for it."""
    sheer.seed_everything(0)
    on_ranks = "RANK" in os.environ
    mesh = mesh_of(dp_shard=2) if on_ranks else None
    model = sharded(mesh) if mesh is not None else Net().double()
    trainer = sheer.Trainer(max_steps=1, precision="64-true", parallel=mesh if mesh is not None else "auto")
    loader = DataLoader(data(), batch_size=24)
    return trainer.test(model, step, loader), sum(1 for _ in trainer.predict(model, step, loader))


def test_a_model_that_its_user_divided_is_evaluated_by_itself() -> None:
    one, batches = evaluated()
    many = run_on_ranks(2, evaluated)
    assert all(found == pytest.approx(one, abs=1e-10) for found, _ in many)
    assert sum(number for _, number in many) == batches


def half_sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = Net().double()
    for block in model.blocks:
        fully_shard(block)
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        model = Net()
    return sharded(None, model)


def trained_before() -> nn.Module:
    model = Net().double()
    trainer = sheer.Trainer(
        max_steps=1, parallel="fsdp", checkpoint=False, loggers=[silent_console()], run_dir="runs/x"
    )
    trainer.fit(model, step, DataLoader(data(), 16), optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1))
    return model


def refusals() -> dict[str, str]:
    from torch.nn.parallel import DistributedDataParallel

    tp, pairs = mesh_of(tp=4), mesh_of(dp_shard=2, tp=2)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    wrong: dict[str, Callable[[], Any]] = {
        "a dp": lambda: train(mesh_of(dp=4)),
        "another name": lambda: train(mesh_of(dp_shard=2, model=2)),
        "no names": lambda: train(init_device_mesh("cpu", (4,))),
        "another order": lambda: train(mesh_of(tp=2, dp_shard=2)),
        "a part": lambda: train(pairs["tp"]),
        "a size beside it": lambda: train(sheer.Parallel(mesh=pairs, tp=4)),
        "no dp_shard": lambda: train(mesh_of(dp_replicate=2, tp=2), plan=tensor_plan()),
        "tp, not told": lambda: train("auto", make=lambda: tensor_parallel(tp)),
        "shards over some": lambda: train("fsdp", make=lambda: sharded(pairs["dp_shard"])),
        "DDP over some": lambda: train(
            "auto", make=lambda: DistributedDataParallel(Net().double(), process_group=alone)
        ),
        "the root forgotten": lambda: train("fsdp", make=half_sharded),
        "a plan besides": lambda: train(pairs, make=lambda: tensor_parallel(pairs["tp"]), plan=tensor_plan()),
        "a pipeline": lambda: train(
            sheer.Parallel(pp=2, pp_split=("blocks.1",), pp_micro_batches=2), make=lambda: sharded(None)
        ),
        "without values": lambda: train("fsdp", make=on_meta, as_function=True),
        "trained before": lambda: train("fsdp", make=trained_before, as_function=True),
    }
    said = {}
    for number, (name, call) in enumerate(wrong.items()):
        try:
            call()
        except sheer.SheerError as error:
            said[name] = str(error)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}; number {number}"
    return said


WORDS = {
    "a dp": 'call it "dp_replicate"',
    "another name": "('dp_shard', 'model'), and a run knows pp, dp_replicate, dp_shard, cp, tp",
    "no names": "The mesh's dimensions have no names",
    "another order": "in an order that is not that of a run",
    "a part": "and 4 were started. Give the whole mesh",
    "a size beside it": "tp=4, and the mesh that was given has 2 there. The mesh says the sizes: leave tp out",
    "no dp_shard": "Give it one of size 1",
    "tp, not told": "[0, 1, 2, 3], and in no module that fully_shard went around. If they share a layer",
    "shards over some": "is divided over the ranks [",
    "DDP over some": "Trainer(parallel=mesh)",
    "the root forgotten": "embed.weight, embed.bias, head.weight and 1 more would be trained by each rank for itself",
    "a plan besides": "parallelize has a plan to do it again",
    "a pipeline": "pp=2 cuts a whole one into stages",
    "without values": "embed.weight has no values",
    "trained before": "A model that another fit divided is to be built anew",
}


def test_what_does_not_fit_together_is_refused_with_the_way_out() -> None:
    for said in run_on_ranks(4, refusals):
        assert said.keys() == WORDS.keys()
        for name, words in WORDS.items():
            assert words in said[name], f"{name}: {said[name]}"
