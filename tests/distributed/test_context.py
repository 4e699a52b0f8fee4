"""Several ranks share each sequence, and train as one process would that holds it whole."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import sheer
from sheer.distributed.context import attention_over
from sheer.distributed.sequence import cut_sequence, sharded_buffers
from sheer.errors import DataError, ModelError, StepError
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("context")  # what its tests share is made once

imported_by_name = scaled_dot_product_attention
WORDS, WIDTH, HEADS, GROUPS, LENGTH = 11, 16, 4, 2, 16


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.head = causal, WIDTH // HEADS
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * GROUPS * self.head)
        angles = torch.arange(64)[:, None] / 100 ** torch.linspace(0, 1, self.head // 2)
        self.register_buffer("cos", angles.cos().repeat(1, 2).double(), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2).double(), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        time = x.shape[-2]
        return x * self.cos[:time] + torch.cat([-right, left], dim=-1) * self.sin[:time]

    def forward(self, x: Tensor) -> Tensor:
        q = self.turned(self.q(x).unflatten(-1, (HEADS, self.head)).transpose(1, 2))
        k, v = (part.unflatten(-1, (GROUPS, self.head)).transpose(1, 2) for part in self.kv(x).chunk(2, dim=-1))
        scale = 0.7 if self.causal else None
        out = F.scaled_dot_product_attention(q, self.turned(k), v, is_causal=self.causal, scale=scale, enable_gqa=True)
        return x + out.transpose(1, 2).flatten(2)


class Transformer(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Attention(causal) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)
        self.checkpointed = False

    def forward(self, words: Tensor, positions: Tensor) -> Tensor:
        x = self.words(words) + self.places(positions)
        for block in self.blocks:
            x = torch.tanh(checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return self.head(x)


class Batch(NamedTuple):
    words: Tensor
    following: Tensor
    counted: Tensor
    positions: Tensor
    weights: Tensor  # one a sentence, so it stays whole


def made(causal: bool) -> tuple[Transformer, Batch]:
    torch.manual_seed(1)
    model = Transformer(causal).double()
    words = torch.randint(WORDS, (3, LENGTH + 1))
    counted = torch.rand(3, LENGTH) < 0.7
    positions = torch.arange(LENGTH).expand(3, -1)
    return model, Batch(words[:, :-1], words[:, 1:], counted, positions, torch.tensor([1.0, 2.0, 0.5]).double())


def step(model: nn.Module, batch: Batch) -> sheer.Mean:
    logits = model(batch.words, batch.positions)
    losses = F.cross_entropy(logits.transpose(1, 2), batch.following, reduction="none") * batch.weights[:, None]
    return sheer.mean(losses, batch.counted)


TABLES = [f"blocks.{index}.{name}" for index in range(2) for name in ("cos", "sin")]


def one_process(causal: bool) -> tuple[float, list[Tensor]]:
    model, batch = made(causal)
    loss = step(model, batch)
    (loss.total / loss.count).backward()
    return (loss.total / loss.count).item(), [parameter.grad for parameter in model.parameters()]


def shared(
    causal: bool, backend: str | None = None, without: str = "", checkpointed: bool = False
) -> tuple[float, float]:
    """Return how far loss and gradients of the ranks are from those of one process; `without` leaves something out."""
    wanted_loss, wanted = one_process(causal)
    model, batch = made(causal)
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    if backend is not None:
        model.compile(backend=backend)
    model.checkpointed = checkpointed
    part = cut_sequence(batch, 1, rank, size)
    tables = [] if without == "tables" else TABLES
    with (
        sharded_buffers(model, tables, [0] * len(tables), LENGTH, rank, size),
        nullcontext() if without == "attention" else attention_over(group),
    ):
        loss = step(model, part)
        loss.total.backward()
    sums = torch.stack([loss.total.detach(), loss.count.double()])
    dist.all_reduce(sums)
    worst = 0.0
    for parameter, whole in zip(model.parameters(), wanted, strict=True):
        dist.all_reduce(parameter.grad)
        worst = max(worst, ((parameter.grad / sums[1] - whole).norm() / whole.norm()).item())
    return abs((sums[0] / sums[1]).item() - wanted_loss), worst


def on_each_rank() -> dict[str, Any]:
    dist.init_process_group("gloo")
    found: dict[str, Any] = {
        "causal": shared(causal=True),
        "whole": shared(causal=False),
        "local attention": shared(causal=True, without="attention"),
        "local tables": shared(causal=True, without="tables"),
    }
    if dist.get_world_size() == 2:
        found["checkpointed"] = shared(causal=True, checkpointed=True)
        found["compiled"] = shared(causal=True, backend="aot_eager")
        found["refused"] = refused()
        found["restored"] = restored()
        found["cast"] = cast()
        found["imported"] = imported()
    return found


def refused() -> list[str]:
    q = torch.ones(1, 2, 4, 8)
    calls = [
        (q, q, q, torch.ones(4, 4)),
        (q, q, q, None, 0.1),
        (q, q[..., :2, :], q[..., :2, :], None, 0.0, True),
    ]
    messages: list[str] = []
    with attention_over(dist.group.WORLD):
        for call in calls:
            with pytest.raises(StepError) as error:
                F.scaled_dot_product_attention(*call)
            messages.append(str(error.value))
        for hidden in (nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, batch_first=True).eval()):
            with pytest.raises(StepError) as error, torch.no_grad():
                hidden(q[0], q[0], q[0], need_weights=False)
            messages.append(str(error.value))
    with pytest.raises(StepError) as error, attention_over(dist.group.WORLD):
        nn.Linear(8, 8)(q)
    messages.append(str(error.value))
    with attention_over(dist.group.WORLD, required=False):
        nn.Linear(8, 8)(q)
    assert F.scaled_dot_product_attention(*calls[2]).shape == q.shape  # outside, all is as it was
    return messages


def cast() -> list[torch.dtype]:
    q = torch.ones(1, 2, 4, 8)
    with attention_over(dist.group.WORLD), torch.autocast("cpu", torch.bfloat16):
        return [F.scaled_dot_product_attention(q, q, q, is_causal=causal).dtype for causal in (True, False)]


def imported() -> list[bool]:
    q = torch.rand(1, 2, 4, 8)
    original = scaled_dot_product_attention
    with attention_over(dist.group.WORLD):
        wanted = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        found = [scaled_dot_product_attention(q, q, q, is_causal=True), imported_by_name(q, q, q, is_causal=True)]
    assert scaled_dot_product_attention is imported_by_name is original
    return [torch.equal(wanted, one) for one in found]


def restored() -> bool:
    model, _ = made(causal=True)
    before = [model.get_buffer(name) for name in TABLES]
    with pytest.raises(KeyError), sharded_buffers(model, TABLES, [0] * 4, LENGTH, 0, 2):
        assert model.get_buffer(TABLES[0]).shape == (LENGTH // 2, WIDTH // HEADS)
        raise KeyError
    return all(model.get_buffer(name) is table for name, table in zip(TABLES, before, strict=True))


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, Any]]]:
    return {size: run_on_ranks(size, on_each_rank) for size in (2, 4)}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("attention", ["causal", "whole"])
def test_losses_and_gradients_are_those_of_one_process(
    found: dict[int, list[dict[str, Any]]], size: int, attention: str
) -> None:
    for of_rank in found[size]:
        loss, gradients = of_rank[attention]
        assert loss < 1e-10
        assert gradients < 1e-8


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("without", ["local attention", "local tables"])
def test_attention_or_positions_of_one_rank_alone_would_be_noticed(
    found: dict[int, list[dict[str, Any]]], size: int, without: str
) -> None:
    for of_rank in found[size]:
        loss, gradients = of_rank[without]
        assert loss > 1e-5
        assert gradients > 1e-3


@pytest.mark.parametrize("kind", ["compiled", "checkpointed"])
def test_a_compiled_or_checkpointed_model_attends_over_the_ranks_too(
    found: dict[int, list[dict[str, Any]]], kind: str
) -> None:
    for of_rank in found[2]:
        loss, gradients = of_rank[kind]
        assert loss < 1e-10
        assert gradients < 1e-8


def test_what_cannot_be_shared_is_refused(found: dict[int, list[dict[str, Any]]]) -> None:
    mask, dropout, lengths, hidden, fast, missing = found[2][0]["refused"]
    assert "mask of shape [4, 4]" in mask
    assert "dropout_p=0.1" in dropout
    assert "4 queries over 2 keys" in lengths
    assert "nn.MultiheadAttention" in hidden
    assert fast == hidden
    assert "called no F.scaled_dot_product_attention" in missing


def test_buffers_are_restored_after_an_error(found: dict[int, list[dict[str, Any]]]) -> None:
    assert found[2][0]["restored"]


def test_autocast_holds_for_attention(found: dict[int, list[dict[str, Any]]]) -> None:
    assert found[2][0]["cast"] == [torch.bfloat16, torch.bfloat16]


def test_attention_imported_by_its_own_name_is_found(found: dict[int, list[dict[str, Any]]]) -> None:
    assert found[2][0]["imported"] == [True, True]


def test_each_rank_has_an_early_and_a_late_chunk() -> None:
    assert own_parts(torch.arange(8)) == [[0, 1, 6, 7], [2, 3, 4, 5]]


def own_parts(whole: Tensor) -> list[list[int]]:
    return [cut_sequence({"x": [whole]}, 0, rank, 2)["x"][0].tolist() for rank in range(2)]


def test_what_has_no_sequence_stays_whole() -> None:
    batch = {"x": torch.arange(16).reshape(2, 8), "label": torch.tensor([3, 4]), "name": "a", "n": 7}
    part = cut_sequence(batch, 1, 1, 2)
    assert part["x"].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert part["label"] is batch["label"]
    assert (part["name"], part["n"]) == ("a", 7)
    assert cut_sequence(batch, 1, 0, 1) is batch


def test_a_sequence_that_does_not_divide_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"sequence of 10 \(dimension 1 of a tensor of shape \[2, 10\]\).*multiple of 4.*to 12"
    ):
        cut_sequence(torch.zeros(2, 10), 1, 0, 2)


def test_sequences_of_different_lengths_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"shape \[2, 12\] is 12 long in dimension 1, where another of the same batch is 8"
    ):
        cut_sequence((torch.zeros(2, 8), torch.zeros(2, 12)), 1, 0, 2)


@pytest.mark.parametrize(
    ("name", "dim", "length", "message"),
    [
        ("cos", 0, 16, "has no buffer 'cos'"),
        ("head.weight", 0, 16, "has no buffer 'head.weight'"),
        ("blocks.0.cos", 0, 128, "does not hold 128 positions in dimension 0"),
        ("blocks.0.cos", 2, 16, "does not hold 16 positions in dimension 2"),
    ],
)
def test_a_buffer_that_cannot_be_shared_is_refused(name: str, dim: int, length: int, message: str) -> None:
    model, _ = made(causal=True)
    with pytest.raises(ModelError, match=message), sharded_buffers(model, [name], [dim], length, 0, 2):
        pass
