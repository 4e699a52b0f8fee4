"""On several ranks: loops of one's own, evaluations by themselves, models built on the meta device or divided by their user."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import sheer
from sheer.console import silent_console
from sheer.distributed.tensors import whole
from tests.distributed.task import CLASSES, Block, Net, assert_same, data, mean_step, step, tensor_plan, train
from tests.ranks import run_on_ranks


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.d = nn.Linear(4, 12, dtype=torch.float64), nn.Linear(12, 1, dtype=torch.float64)


def d_step(gan: Gan, batch: Any) -> dict[str, Any]:
    real, fake = gan.d(batch[0]), gan.d(gan.g(batch[0][:, :4]).detach())
    return {"loss": F.softplus(-real).mean() + F.softplus(fake).mean()}


def g_step(gan: Gan, batch: Any) -> dict[str, Any]:
    return {"loss": sheer.mean(F.softplus(-gan.d(gan.g(batch[0][:, :4]))))}


def train_gan(parallel: Any) -> dict[str, Any]:
    sheer.seed_everything(0)
    gan = Gan()
    optimizers = {"d": torch.optim.Adam(gan.d.parameters(), 1e-2), "g": torch.optim.Adam(gan.g.parameters(), 1e-2)}
    trainer = sheer.Trainer(
        max_steps=9,
        parallel=parallel,
        checkpoint=False,
        log_every_n_steps=1,
        run_dir=f"runs/{trainer_name(parallel)}",
        loggers=[silent_console()],
    )
    run = trainer.start(gan, optimizers=optimizers)
    outputs = []
    for batch in run.steps(DataLoader(data(), batch_size=16, shuffle=True)):
        run.update(optimizers["d"], d_step, batch)
        run.update(optimizers["g"], g_step, batch)
        if run.step % 4 == 0:
            outputs.append(run.evaluate(d_step, DataLoader(data(), batch_size=24)))
    run.finish()
    return {
        "evaluations": outputs,
        "weights": {name: whole(value.detach()).clone() for name, value in gan.state_dict().items()},
    }


def trainer_name(parallel: Any) -> str:
    return parallel if isinstance(parallel, str) else "mesh"


@pytest.mark.parametrize(("ranks", "parallel"), [(2, "ddp"), (3, "ddp"), (2, "fsdp")])
def test_a_loop_of_ones_own_is_the_same_on_several_ranks(ranks: int, parallel: str) -> None:
    one = train_gan("auto")
    for many in run_on_ranks(ranks, train_gan, parallel):
        for expected, found in zip(one["evaluations"], many["evaluations"], strict=True):
            assert found == pytest.approx(expected, abs=1e-10)
        for name, value in one["weights"].items():
            assert torch.allclose(value, many["weights"][name], rtol=1e-8, atol=1e-10)


def evaluated(parallel: Any) -> list[Any]:
    """Evaluate before anything is trained, after a fit, and with the weights of a checkpoint."""
    sheer.seed_everything(0)
    model = Net()
    trainer = sheer.Trainer(
        max_steps=5,
        parallel=parallel,
        precision="64-true",
        run_dir=f"runs/{trainer_name(parallel)}",
        loggers=[silent_console()],
    )
    loader = DataLoader(data(), batch_size=24)
    first = trainer.validate(model, step, loader)
    trainer.fit(
        model,
        step,
        DataLoader(data(), batch_size=16, shuffle=True),
        optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1),
    )
    fresh = Net()
    return [
        first,
        trainer.test(model, step, loader),
        trainer.test(model, mean_step, loader, checkpoint="last", limit_batches=3),
        trainer.test(fresh, step, loader, checkpoint="last"),
        [output["accuracy"].item() for output in trainer.predict(model, step, loader)],
    ]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_evaluations_by_themselves_count_every_sample_once(parallel: str) -> None:
    one, parts = evaluated("auto"), run_on_ranks(2, evaluated, parallel)
    for many in parts:
        for expected, found in zip(one[:4], many[:4], strict=True):
            assert found == pytest.approx(expected, abs=1e-10)
    predicted = [value for pair in zip(*(many[4] for many in parts), strict=False) for value in pair]
    assert [*predicted, *parts[0][4][len(parts[1][4]) :]] == pytest.approx(one[4])


class Tied(Net):
    """A head that shares its weight with the embedding, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(CLASSES, 16)
        self.head.weight = self.first.weight


def meta(make: Any) -> Any:
    with torch.device("meta"):
        return make()


def trained_on_meta(parallel: Any, folder: str) -> dict[str, Any]:
    plan = tensor_plan() if getattr(parallel, "tp", 1) > 1 else None
    return train(parallel, plan=plan, folder=folder, make=MetaNet, as_function=True, max_steps=5)


def MetaNet() -> nn.Module:
    model: nn.Module = meta(Tied)
    return model


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, "fsdp"), (2, "ddp"), (4, sheer.Parallel(tp=2)), (2, sheer.Parallel(shard_min_parameters=500))],
)
def test_a_model_on_the_meta_device_gets_the_numbers_of_one_that_is_not_divided(ranks: int, parallel: Any) -> None:
    one = trained_on_meta("auto", "runs/one")
    assert one["weights"]["head.weight"].isfinite().all()
    for many in run_on_ranks(ranks, trained_on_meta, parallel, "runs/many"):
        assert_same(one, many, logged=1e-10, weights=1e-8)


def no_reset() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(sheer.ModelError, match="Scale, which holds scale, has no reset_parameters"):
        train("fsdp", make=lambda: meta(Scale), as_function=True)


def test_what_cannot_be_initialised_is_named() -> None:
    run_on_ranks(2, no_reset)


def by_hand(model: nn.Module, mesh: Any) -> list[nn.Module]:
    """Divide a model by PyTorch's own calls; what is returned is sharded."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return list(model.blocks)


def whole_by_hand(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp_shard"])
    fully_shard(model, mesh=mesh["dp_shard"])


def with_functions() -> list[dict[str, Any]]:
    return [
        train(sheer.Parallel(tp=2), plan=by_hand, folder="runs/a", gradient_clip_val=0.5),
        train("fsdp", plan=whole_by_hand, folder="runs/b", gradient_clip_val=0.5, as_function=True),
    ]


def test_a_function_divides_the_model_by_pytorchs_own_calls() -> None:
    one = train(gradient_clip_val=0.5)
    for results in run_on_ranks(4, with_functions):
        for many in results:
            assert_same(one, many, logged=1e-10, weights=1e-8)


def divided_before() -> list[dict[str, Any]]:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group()

    def make() -> nn.Module:
        return DistributedDataParallel(Net().double())

    return [train("ddp", make=make, folder="runs/a")]


def test_a_model_that_is_divided_already_is_trained_as_it_is() -> None:
    one = train()
    for (many,) in run_on_ranks(2, divided_before):
        many["weights"] = {name.removeprefix("module."): value for name, value in many["weights"].items()}
        assert_same(one, many, logged=1e-10, weights=1e-8)


def sharded_modules() -> dict[str, list[str]]:
    from sheer.distributed.wrap import units_of

    model = Net()
    names = {id(module): name for name, module in model.named_modules()}

    def chosen(**options: Any) -> list[str]:
        return [names[id(module)] for module in units_of(model, sheer.Parallel(**options))]

    return {
        "default": chosen(),
        "class": chosen(shard_modules=("LayerNorm",)),
        "size": chosen(shard_min_parameters=500),
    }


def test_what_is_sharded_by_itself_is_said_by_class_or_size() -> None:
    assert sharded_modules() == {
        "default": ["blocks.0", "blocks.1"],
        "class": ["blocks.0.norm", "blocks.1.norm"],
        "size": ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"],
    }


def dropped(parallel: Any) -> list[float]:
    """What dropout leaves of ones, in the first step."""
    kept: list[float] = []

    def dropping(model: nn.Module, batch: Any) -> torch.Tensor:
        kept.extend(F.dropout(torch.ones(16), 0.5).tolist())
        return model(batch[0]).square().mean()

    plan = tensor_plan() if getattr(parallel, "tp", 1) > 1 else None
    train(
        parallel,
        plan=plan,
        run_step=dropping,
        max_steps=1,
        val_loader=lambda d: None,
        folder=f"runs/{trainer_name(parallel)}",
    )
    return kept


def test_dropout_differs_on_data_ranks_and_agrees_on_tensor_ranks() -> None:
    first, second, third, fourth = run_on_ranks(4, dropped, sheer.Parallel(tp=2))
    assert first == second and third == fourth and first != third
    assert first == dropped("auto")  # rank 0 draws what one process does


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a size that does not divide": (
        {"parallel": sheer.Parallel(tp=3)},
        "needs a multiple of 3 ranks, and 2 were started",
    ),
    "sizes for other ranks": ({"parallel": sheer.Parallel(dp_shard=4)}, "needs 4 ranks, and 2 were started"),
    "tp without a plan": ({"parallel": sheer.Parallel(tp=2)}, "fit was given none. Pass parallelize="),
    "a plan for what is not there": (
        {"parallel": sheer.Parallel(tp=2), "plan": {"blocks.*.left": None}},
        "no such module",
    ),
    "a class that is not there": (
        {"parallel": sheer.Parallel(shard_modules=("Layer",))},
        "no module of that class; it has Block",
    ),
    "alone on several": ({"parallel": "none"}, "each would train by itself"),
    "a thaw in the run": (
        {"parallel": "ddp", "callbacks": [sheer.Freeze("head.*", until_step=3)]},
        "ranks agree on that at its start",
    ),
}


def refusals() -> dict[str, str]:
    said = {}
    for name, (options, _) in REFUSED.items():
        try:
            train(folder=f"runs/{name}", **options)
        except sheer.SheerError as error:
            said[name] = str(error)
    return said


def test_what_cannot_be_divided_is_refused_with_the_way_out() -> None:
    for said in run_on_ranks(2, refusals):
        for name, (_, words) in REFUSED.items():
            assert words in said[name]


def other_models() -> str:
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    import os

    def make() -> nn.Module:
        return nn.Sequential(*[Block() for _ in range(1 + int(os.environ["RANK"]))])

    with pytest.raises(sheer.ModelError, match=r"Rank 1 built another model than rank 0; they differ in 1\.") as caught:
        train("fsdp", make=make)
    return str(caught.value)


def test_ranks_that_built_different_models_are_told() -> None:
    run_on_ranks(2, other_models)


def unseeded() -> dict[str, torch.Tensor]:
    import os

    torch.manual_seed(int(os.environ["RANK"]) + 5)
    model = Net().double()
    trainer = sheer.Trainer(
        max_steps=1, parallel="fsdp", checkpoint=False, loggers=[silent_console()], run_dir="runs/here"
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.fit(model, step, DataLoader(data(), 16), optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.0))
    after = {name: whole(value.detach()).clone() for name, value in model.state_dict().items()}
    return {"before": before, "after": after}  # type: ignore[dict-item]


def test_all_ranks_start_from_the_weights_of_the_first() -> None:
    first, second = run_on_ranks(2, unseeded)
    for name, value in first["before"].items():
        assert torch.equal(first["after"][name], value) and torch.equal(second["after"][name], value)
    assert any(not torch.equal(second["before"][name], value) for name, value in first["before"].items())
