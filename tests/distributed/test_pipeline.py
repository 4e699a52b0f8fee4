"""The stages of a model on several ranks give the gradients that the whole model gives on one, under each of PyTorch's schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import sheer
from sheer.distributed.pipeline import PipelineStep
from sheer.distributed.stages import check_stages, split_model, stages_of_rank
from sheer.errors import DataError, ModelError, SettingsError, SheerError, StepError
from sheer.nonfinite import Watch
from tests.distributed.task import Net, assert_same, train
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("pipeline")  # what its tests share is made once

SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
MICRO_BATCHES, SAMPLES = 4, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return x if mask is None else x * mask[..., None]


class Words(nn.Module):
    """The convention of stages: what is missing is passed by."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(8, 11)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(x) * self.scale if self.embed is not None else x
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x) if self.head is not None else x


POINTS = {2: ["blocks.2"], 4: ["blocks.1", "blocks.2", "blocks.3"]}


def words(trainable: bool = True) -> Words:
    torch.manual_seed(3)
    model = Words().double()
    model.embed.requires_grad_(trainable)
    return model


def batches() -> list[tuple[dict[str, Tensor], int]]:
    torch.manual_seed(4)
    return [
        (
            {
                "words": torch.randint(11, (SAMPLES, 5)),
                "following": torch.randint(11, (SAMPLES, 5)),
                "mask": (torch.rand(SAMPLES, 5) < 0.7).double(),
            },
            SAMPLES,
        )
        for _ in range(MICRO_BATCHES)
    ]


def mean_step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    logits = model(batch["words"], mask=batch["mask"])
    losses = F.cross_entropy(logits.transpose(1, 2), batch["following"], reduction="none")
    return {
        "loss": sheer.mean(losses, batch["mask"]),
        "right": (logits.argmax(-1) == batch["following"]).float().mean(),
    }


def drawing_step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    mixed = torch.rand(()).double()  # as mixup does: the same number before and behind the model
    order = torch.randperm(SAMPLES)
    logits = model(batch["words"][order])
    losses = F.cross_entropy(logits.transpose(1, 2), batch["following"][order], reduction="none")
    return mixed * losses.mean()


def gradients_of_one(
    model: nn.Module, step: Callable[..., Any], weights: list[float], mean_weight: float
) -> tuple[list[Any], dict[str, Tensor]]:
    from sheer.distributed.stand_in import drawing_alike

    outputs = []
    for index, (batch, _) in enumerate(batches()):
        with drawing_alike(9, index, torch.device("cpu")):
            output = step(model, batch)
        loss = output["loss"] if isinstance(output, dict) else output
        (loss.total * mean_weight if isinstance(loss, sheer.Mean) else loss * weights[index]).backward()
        outputs.append(output)
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def pipeline_of(model: nn.Module, points: list[str], schedule: str) -> PipelineStep:
    size, number = dist.get_world_size(), len(points) + 1
    mine = stages_of_rank(schedule, dist.get_rank(), size, number)
    stages = dict(zip(mine, split_model(model, points, mine), strict=True))
    return PipelineStep(stages, number, dist.group.WORLD, schedule, torch.device("cpu"))


def number_for(schedule: str, size: int) -> int:
    return size if schedule in ("GPipe", "1F1B") else 2 * size


def compared(schedule: str, step: Callable[..., Any], trainable: bool = True) -> dict[str, Any]:
    """Return how far the gradients of a step are from those of one process, and what it returned."""
    weights, mean_weight = [0.1, 0.2, 0.3, 0.4], 1 / 12
    outputs, wanted = gradients_of_one(words(trainable), step, weights, mean_weight)
    pipeline = pipeline_of(words(trainable), POINTS[number_for(schedule, dist.get_world_size())], schedule)
    worst, seen = 0.0, set()
    for _ in range(2):  # the second time with the buffers of the first
        given = pipeline.run(step, batches(), weights, mean_weight, seed=9)
        for stage in pipeline.stages.values():
            for name, parameter in stage.named_parameters():
                if parameter.grad is not None:
                    seen.add(name)
                    worst = max(worst, ((parameter.grad - wanted[name]).norm() / wanted[name].norm()).item())
                    parameter.grad = None
    for one, other in zip(outputs, given or outputs, strict=True):
        torch.testing.assert_close(
            *(output["loss"].total if isinstance(output, dict) else output for output in (one, other))
        )
    count = pipeline.count_of(given)
    return {
        "worst": worst,
        "seen": sorted(seen),
        "wanted": sorted(wanted),
        "last": given is not None,
        "count": None if count is None else count.item(),
    }


def every_schedule() -> dict[str, Any]:
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for schedule in SCHEDULES:
        found[schedule] = compared(schedule, mean_step)
    for schedule in ("1F1B", "ZBVZeroBubble"):
        found[f"{schedule}, drawing"] = compared(schedule, drawing_step)
        found[f"{schedule}, frozen"] = compared(schedule, mean_step, trainable=False)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_on_ranks(2, every_schedule)


CASES = [*SCHEDULES, *(f"{name}, {kind}" for name in ("1F1B", "ZBVZeroBubble") for kind in ("drawing", "frozen"))]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(found: list[dict[str, Any]], case: str) -> None:
    ranks = [of_rank[case] for of_rank in found]
    assert max(rank["worst"] for rank in ranks) < 1e-8
    assert sorted(name for rank in ranks for name in rank["seen"]) == ranks[0]["wanted"]
    assert [rank["last"] for rank in ranks] == [
        ("ZBV" in case or "Dual" in case),
        not ("ZBV" in case or "Dual" in case),
    ]


def views() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.Unflatten(1, (2, 4)),  # a view, where a stage ends
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.Sequential(nn.Tanh(), nn.BatchNorm1d(8)),
        nn.Linear(8, 3),
    ).double()


def picture_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    assert model.training
    SEEN.append(batch[1])
    return {"loss": F.cross_entropy(model(batch[0]), batch[1])}


SEEN: list[Tensor] = []


def pictures() -> list[tuple[tuple[Tensor, Tensor], int]]:
    torch.manual_seed(6)
    return [((torch.rand(5, 6).double(), torch.randint(3, (5,))), 5) for _ in range(MICRO_BATCHES)]


def sequential(schedule: str) -> dict[str, Any]:
    whole, weights = views(), [0.25] * MICRO_BATCHES
    for batch, _ in pictures():
        (picture_step(whole, batch)["loss"] * 0.25).backward()
    points = ["3", "5", "6.1"] if number_for(schedule, 2) == 4 else ["3"]
    pipeline = pipeline_of(views(), points, schedule)
    SEEN.clear()
    pipeline.run(picture_step, pictures(), weights, 1.0, seed=0)
    wanted = dict(whole.named_parameters())
    pairs = [(p.grad, wanted[n].grad) for stage in pipeline.stages.values() for n, p in stage.named_parameters()]
    kept = dict(whole.named_buffers())
    pairs += [(b.double(), kept[n].double()) for stage in pipeline.stages.values() for n, b in stage.named_buffers()]
    return {
        "far": max([((one - other).norm() / other.norm()).item() for one, other in pairs]),
        "seen": len(SEEN),
        "last": pipeline.is_last,
        "weighted": pipeline.count_of([{"loss": torch.ones(())}]) is not None,
    }


def evaluated(schedule: str, parts: int) -> list[float] | None:
    pipeline = pipeline_of(words(), POINTS[number_for(schedule, 2)], schedule)
    for stage in pipeline.stages.values():
        stage.eval()
    outputs = pipeline.evaluate(mean_step, batches()[:parts], seed=0)
    assert not any(p.grad is not None for stage in pipeline.stages.values() for p in stage.parameters())
    return None if outputs is None else [output["loss"].total.item() for output in outputs]


def dropped(schedule: str) -> list[bool] | None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    pipeline = pipeline_of(model, ["1", "2", "4"] if number_for(schedule, 2) == 4 else ["2"], schedule)
    outputs = pipeline.run(picture_step, pictures(), [1.0] * MICRO_BATCHES, 1.0, seed=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for s in pipeline.stages.values() for p in s.parameters())
    return None if outputs is None else [bool(output["loss"].isfinite()) for output in outputs]


def never(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return batch["mask"].sum()


def twice(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["words"]).sum() + model(batch["words"]).sum()


def method(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.embed(batch["words"]).sum()


def by_keyword(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(x=batch["words"]).sum()


def on_gradients(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["words"], mask=batch["mask"].requires_grad_()).sum()


def without_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["words"])


def swallowing(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    try:
        return model(batch["words"]).mean()
    except Exception:
        return batch["mask"].sum()


def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["words"]).mean()


class Unaware(Words):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.embed(x))


class Counting(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x.long()


def refusal(kind: type[SheerError], step: Callable[..., Any], model: nn.Module, parts: list[Any]) -> str:
    pipeline = pipeline_of(model, POINTS[2], "1F1B")
    with pytest.raises(kind) as error:
        pipeline.run(step, parts, [1.0] * len(parts), 1.0, seed=0)
    return str(error.value)


def refusals() -> dict[str, str]:
    shorter = [({name: value[:2] for name, value in batches()[0][0].items()}, 2)]
    counting = words()
    counting.blocks[1] = Counting().double()
    found = {
        step.__name__: refusal(StepError, step, words(), batches())
        for step in (never, twice, method, by_keyword, on_gradients)
    }
    return {
        **found,
        "shapes": refusal(DataError, plain, words(), batches()[:1] + shorter),
        "few": refusal(SettingsError, plain, words(), batches()[:1]),
        "unaware": refusal(ModelError, plain, Unaware().double(), batches()),
        "counting": refusal(ModelError, plain, counting, batches()),
    }


def the_rest() -> dict[str, Any]:
    dist.init_process_group("gloo")
    pipeline = pipeline_of(words(), POINTS[2], "1F1B")
    swallowed = pipeline.run(swallowing, batches(), [1.0] * MICRO_BATCHES, 1.0, seed=0)
    found = {
        **{f"sequential, {schedule}": sequential(schedule) for schedule in ("1F1B", "ZBVZeroBubble")},
        **{f"evaluated, {schedule}": evaluated(schedule, parts) for schedule, parts in EVALUATED},
        **{f"dropped, {schedule}": dropped(schedule) for schedule in ("GPipe", "Interleaved1F1B", "ZBVZeroBubble")},
        "swallowed": swallowed is not None,
        "refusals": refusals(),
    }
    if dist.get_rank() == 1:
        with pytest.raises(StepError) as error:
            lossless(pipeline)
        found["lossless"] = str(error.value)
    return found


def lossless(pipeline: PipelineStep) -> None:
    """What the last stage does with a step that returns no loss; the others would wait."""
    from sheer.distributed.pipeline import PipelineWork

    pipeline._work = PipelineWork(without_loss, [batch for batch, _ in batches()], 0, (), [1.0], outputs=[None])
    pipeline._loss_of(torch.ones(2, 2, requires_grad=True), torch.tensor([0]))


def on_four() -> dict[str, Any]:
    dist.init_process_group("gloo")
    return {schedule: compared(schedule, mean_step) for schedule in ("GPipe", "1F1B")}


def test_four_stages_on_four_ranks_give_the_gradients_too() -> None:
    for of_rank in run_on_ranks(4, on_four):
        assert max(case["worst"] for case in of_rank.values()) < 1e-8


def sharded() -> dict[str, tuple[float, int]]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp_shard"))
    weights, mean_weight = [0.1, 0.2, 0.3, 0.4], 1 / 12
    _, wanted = gradients_of_one(words(), mean_step, weights, mean_weight)
    found = {}
    for schedule in SHARDED:
        points = POINTS[number_for(schedule, 2)]
        mine = stages_of_rank(schedule, mesh.get_local_rank("pp"), 2, len(points) + 1)
        stages = dict(zip(mine, split_model(words(), points, mine), strict=True))
        for stage in stages.values():
            for part in (*stage.blocks, stage):
                fully_shard(part, mesh=mesh["dp_shard"])
        pipeline = PipelineStep(stages, len(points) + 1, mesh.get_group("pp"), schedule, torch.device("cpu"))
        pipeline.run(mean_step, batches(), weights, mean_weight, seed=9)
        named = [(name, p.grad.full_tensor()) for stage in stages.values() for name, p in stage.named_parameters()]
        found[schedule] = (max((one - wanted[name]).abs().max().item() for name, one in named), len(named))
    return found


SHARDED = ["1F1B", "ZBVZeroBubble"]


def test_stages_may_be_sharded() -> None:
    ranks = run_on_ranks(4, sharded)
    for schedule in SHARDED:
        assert max(of_rank[schedule][0] for of_rank in ranks) < 1e-12
        assert sum(of_rank[schedule][1] for of_rank in ranks) == 2 * len(list(words().parameters()))


EVALUATED = [("1F1B", 1), ("Interleaved1F1B", 3), ("ZBVZeroBubble", 1)]


@pytest.fixture(scope="module")
def rest() -> list[dict[str, Any]]:
    return run_on_ranks(2, the_rest)


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_a_sequential_model_needs_nothing_and_keeps_its_buffers(rest: list[dict[str, Any]], schedule: str) -> None:
    for of_rank in rest:
        assert of_rank[f"sequential, {schedule}"]["far"] < 1e-8
        assert not of_rank[f"sequential, {schedule}"]["weighted"]


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_the_rank_that_measures_runs_the_step_for_its_call_and_for_its_loss(
    rest: list[dict[str, Any]], schedule: str
) -> None:
    (last,) = [rank for rank in (of_rank[f"sequential, {schedule}"] for of_rank in rest) if rank["last"]]
    assert last["seen"] == 2 * MICRO_BATCHES


@pytest.mark.parametrize(("schedule", "parts"), EVALUATED)
def test_evaluation_returns_what_one_process_would(rest: list[dict[str, Any]], schedule: str, parts: int) -> None:
    model = words().eval()
    wanted = [mean_step(model, batch)["loss"].total.item() for batch, _ in batches()[:parts]]
    (given,) = [of_rank[f"evaluated, {schedule}"] for of_rank in rest if of_rank[f"evaluated, {schedule}"]]
    assert given == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("schedule", ["GPipe", "Interleaved1F1B", "ZBVZeroBubble"])
def test_dropout_runs(rest: list[dict[str, Any]], schedule: str) -> None:
    assert [of_rank[f"dropped, {schedule}"] for of_rank in rest].count([True] * MICRO_BATCHES) == 1


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ("never", "must call model(...) exactly once; it did not call it"),
        ("twice", "must call model(...) exactly once; it called it again"),
        (
            "method",
            "must call model(...) exactly once, and use nothing else of it: no rank holds all of it. It used model.embed",
        ),
        ("by_keyword", "must call model(...) exactly once, with the tensors that go into the first stage by position"),
        ("on_gradients", "must call model(...) exactly once, on data. It was called on a tensor that needs gradients"),
        (
            "shapes",
            "called with argument 0 [3, 5] in the first of this step, and with argument 0 [2, 5] in number 2 of 2",
        ),
        ("few", "The schedule 1F1B cannot run 1 micro-batches a step over 2 stages"),
        ("unaware", "Stage 0 of the model cannot run: TypeError(\"'NoneType' object is not callable\")"),
        (
            "counting",
            "Stage 0 of the model cannot run: ModelError('it must return a tensor or a tuple of tensors, floating",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_on_all_ranks(rest: list[dict[str, Any]], refused: str, message: str) -> None:
    for of_rank in rest:
        assert message in of_rank["refusals"][refused]


def test_a_step_without_a_loss_is_refused(rest: list[dict[str, Any]]) -> None:
    assert "without_loss returned a loss of shape [2, 2]" in rest[1]["lossless"]


def test_a_step_that_catches_exceptions_is_recorded_all_the_same(rest: list[dict[str, Any]]) -> None:
    assert [of_rank["swallowed"] for of_rank in rest] == [False, True]


def test_counts_of_means_are_known_on_every_rank(found: list[dict[str, Any]]) -> None:
    wanted = sum(batch["mask"].sum().item() for batch, _ in batches())
    assert [of_rank["GPipe"]["count"] for of_rank in found] == [wanted, wanted]


def test_stages_keep_the_models_own_parameters_under_their_names() -> None:
    model = words()
    first, second = split_model(model, ["blocks.2"], [0, 1])
    assert [*first.state_dict(), *second.state_dict()] == list(model.state_dict())
    assert second.get_parameter("blocks.3.up.weight") is model.blocks[3].up.weight
    assert (len(first.blocks), len(second.blocks), first.head, second.embed) == (2, 2, None, None)
    assert len(model.blocks) == 4


def test_stages_are_dealt_out_as_the_schedule_wants() -> None:
    assert [stages_of_rank("1F1B", rank, 2, 2) for rank in range(2)] == [[0], [1]]
    assert [stages_of_rank("Interleaved1F1B", rank, 2, 4) for rank in range(2)] == [[0, 2], [1, 3]]
    assert [stages_of_rank("ZBVZeroBubble", rank, 2, 4) for rank in range(2)] == [[0, 3], [1, 2]]


@pytest.mark.parametrize(
    ("schedule", "number", "message"),
    [
        ("1F1B", 4, "needs 2, one a rank, and the model is cut into 4"),
        ("Interleaved1F1B", 3, "needs a multiple of 2"),
        ("ZBVZeroBubble", 2, "needs 4, two a rank"),
        ("2F2B", 2, "'2F2B' is no schedule"),
    ],
)
def test_stages_that_do_not_fit_the_schedule_are_refused(schedule: str, number: int, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        stages_of_rank(schedule, 0, 2, number)


@pytest.mark.parametrize("points", [["blocks.9"], ["embed"], ["blocks", "blocks.2"], ["head", "head"]])
def test_a_split_point_that_begins_no_stage_is_refused(points: list[str]) -> None:
    with pytest.raises(ModelError, match="do not begin a stage"):
        split_model(words(), points, [0])


def test_a_parameter_in_two_stages_is_refused() -> None:
    model = words()
    model.head.weight = model.embed.weight
    with pytest.raises(ModelError, match=r"embed.weight and head.weight are one parameter, in stages 0 and 1"):
        split_model(model, ["blocks.2"], [0])


class Glued(Words):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.tanh(super().forward(x, mask))  # on every stage


def test_stages_that_do_not_make_the_model_are_found() -> None:
    batch = batches()[0][0]
    check_stages(words(), POINTS[4], (batch["words"],), {"mask": batch["mask"]})
    with pytest.raises(ModelError, match="do not compute what the model computes"):
        check_stages(Glued().double(), POINTS[2], (batch["words"],), {"mask": batch["mask"]})
    with pytest.raises(ModelError, match=r"Stage 0 of the model cannot run: .*NoneType"):
        check_stages(Unaware().double(), POINTS[2], (batch["words"],), {})


class Moded(Net):
    """Computes otherwise when it is evaluated."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.training or self.head is None else x * 0.5


def moded_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    return {"loss": F.cross_entropy(model(batch[0]), batch[1]) * (1.0 if model.training else 3.0)}


def moded(parallel: Any) -> dict[str, Any]:
    return train(parallel, make=Moded, run_step=moded_step, max_steps=9, folder="one" if parallel == "auto" else "many")


def test_in_a_validation_the_stages_and_the_step_see_a_model_in_eval_mode() -> None:
    one = moded("auto")
    parallel = sheer.Parallel(pp=2, pp_split=("blocks.1",), pp_micro_batches=4)
    for result in run_on_ranks(2, moded, parallel):
        assert_same(one, result, logged=1e-10, weights=1e-8)


def squares(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), F.one_hot(batch[1], 5).double())


def squares_as_mean(model: nn.Module, batch: Any) -> dict[str, Any]:
    return {"loss": sheer.Mean(squares(model, batch) * len(batch[1]), len(batch[1]))}


def watched() -> list[tuple[bool, int]]:
    """Return of each number that a run hands to its watch whether it needs a gradient, and how much memory it keeps."""
    seen: list[tuple[bool, int]] = []
    added = Watch.add

    def add(watch: Watch, step: int, what: str, value: Tensor) -> None:
        seen.append((value.requires_grad, value.untyped_storage().nbytes()))
        added(watch, step, what, value)

    pytest.MonkeyPatch().setattr(Watch, "add", add)  # in this rank, which ends with the test
    for step in (squares, squares_as_mean):
        parallel = sheer.Parallel(pp=2, pp_split=("blocks.1",), pp_micro_batches=4)
        train(parallel, run_step=step, max_steps=2, folder=f"runs/{step.__name__}")
    return seen


def test_what_is_watched_of_a_pipeline_holds_no_graph_and_no_other_memory() -> None:
    """As tests/test_metrics.py asks of one process."""
    first, last = run_on_ranks(2, watched)
    assert not first
    assert len(last) == 2 * 2 * 4  # steps that return a loss, or a mean; updates; micro-batches
    assert all(seen == (False, 8) for seen in last)
