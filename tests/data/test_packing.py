"""Packed rows hold every prediction once, and a model that trains on them does as one that sees each document by itself."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

import sheer
from sheer.data import Packed
from sheer.data.packing import best_fit
from sheer.errors import StepError
from tests.task import assert_same, trainer
from tests.test_resume import StopAt

TOKENS, WIDTH, HEADS, LENGTH = 11, 16, 2, 24


def texts(sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(TOKENS, (size,), generator=generator) for size in sizes]


DOCUMENTS = texts([5, 70, 2, 24, 25, 26, 0, 1, 9, 9, 13, 3])  # some longer than a row, some with nothing to predict


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda s: max(s) > 1), length=st.integers(1, 16))  # fmt: skip
def test_every_token_behind_the_first_of_its_document_is_predicted_once(sizes: list[int], length: int) -> None:
    documents = [[100 * number + at for at in range(size)] for number, size in enumerate(sizes)]
    packed = Packed(documents, length, pad=-1)
    pairs, filled = [], 0
    for row in packed:
        ends = [*row["starts"].tolist(), length]
        assert len(ends) - 1 == packed.most_documents and ends == sorted(ends)
        for start, end in itertools.pairwise(ends):
            assert row["documents"][start:end].unique().numel() <= 1
            if (row["tokens"][start:end] == -1).all():  # empty places, or none
                assert not row["positions"][start:end].any() and (row["targets"][start:end] == -100).all()
                continue
            assert row["positions"][start:end].tolist() == list(range(end - start))
            assert (row["tokens"][start:end].diff() == 1).all()
            assert torch.equal(row["targets"][start:end], row["tokens"][start:end] + 1)
            filled += end - start
            pairs += row["targets"][start:end].tolist()
        assert (row["documents"].diff() >= 0).all()
    assert sorted(pairs) == [token for document in documents for token in document[1:]]
    assert packed.fill == pytest.approx(filled / (len(packed) * length))


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_no_row_is_too_full_and_no_two_rows_would_fit_in_one(sizes: list[int]) -> None:
    rows = best_fit(sizes, 20)
    sums = sorted(np.bincount(rows, weights=sizes))
    assert sums[-1] <= 20 and sums[0] > 0
    assert len(sums) == 1 or sums[0] + sums[1] > 20


def test_hardly_a_place_is_empty() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 20_000).astype(int) + 2  # from 2 to 40,000 tokens
    packed = Packed([None] * len(lengths), 1024, lengths=lengths)
    assert packed.fill > 0.999
    one_by_one = (lengths - 1).sum() / (-(-(lengths - 1) // 1024) * 1024).sum()
    assert one_by_one < 0.5  # what rows of one document each would hold


class Transformer(nn.Module):
    """One layer of attention, by a function of (q, k, v)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.qkv, self.mlp, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Any) -> Tensor:
        x = self.tokens(tokens) + self.positions(positions)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        x = x + attend(q, k, v).transpose(1, 2).flatten(2)
        return x + self.mlp(x).tanh()


def by_mask(batch: Any) -> Any:
    mask = sheer.document_mask(batch["documents"])
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_offsets(batch: Any) -> Any:
    """What `varlen_attn` does, which has no CPU kernel: all tokens in one row, cut at the offsets."""
    offsets = sheer.document_offsets(batch["starts"], LENGTH).tolist()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [part.transpose(1, 2).flatten(0, 1) for part in (q, k, v)]
        parts = [
            F.scaled_dot_product_attention(*(part[start:stop].transpose(0, 1) for part in flat), is_causal=True)
            for start, stop in itertools.pairwise(offsets)
        ]
        return torch.cat(parts, dim=1).transpose(0, 1).unflatten(0, (-1, LENGTH)).transpose(1, 2)

    return attend


def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("way", [by_mask, by_offsets])
def test_loss_and_gradients_are_those_of_each_document_by_itself(way: Any) -> None:
    torch.manual_seed(0)
    model = Transformer().double()
    batch = default_collate(list(Packed(DOCUMENTS, LENGTH)))
    assert batch["tokens"].shape[0] >= 5 and (batch["targets"] == -100).any()
    hidden = model(batch["tokens"], batch["positions"], way(batch))
    loss = sheer.linear_cross_entropy(hidden, model.head.weight, batch["targets"], model.head.bias)
    loss.total.backward()
    packed = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()

    total, count = torch.tensor(0.0, dtype=torch.float64), 0
    for document in DOCUMENTS:
        for start in range(0, len(document) - 1, LENGTH):
            text = document[start : start + LENGTH + 1][None]
            positions = torch.arange(text.shape[1] - 1)[None]
            logits = model.head(model(text[:, :-1], positions, alone))
            total = total + F.cross_entropy(logits[0], text[0, 1:], reduction="sum")
            count += text.shape[1] - 1
    total.backward()
    assert loss.count.item() == count
    torch.testing.assert_close(loss.total, total, rtol=1e-12, atol=0)
    for mine, parameter in zip(packed, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_blocks_of_flex_attention_are_the_mask() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    batch = default_collate(list(Packed(texts([300, 90, 150, 7, 200, 256, 31]), 256)))
    q, k, v = torch.randn(3, batch["tokens"].shape[0], HEADS, 256, 8, generator=torch.Generator().manual_seed(0))
    blocks = sheer.document_block_mask(batch["documents"])
    assert 0 < blocks.sparsity() < 100
    mask = sheer.document_mask(batch["documents"])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=blocks), expected, rtol=1e-5, atol=1e-5)


def packed_step(model: Transformer, batch: dict[str, Tensor]) -> sheer.Mean:
    hidden = model(batch["tokens"], batch["positions"], by_mask(batch))
    return sheer.linear_cross_entropy(hidden, model.head.weight, batch["targets"], model.head.bias)


def run(folder: str, stop_at: int | None = None, **settings: Any) -> dict[str, Tensor]:
    sheer.seed_everything(0)
    model = Transformer()
    packed = Packed(texts([7, 3, 30, 12, 50, 5, 9, 22, 17, 2, 40]), LENGTH)
    made = trainer(
        run_dir=folder, resume="auto", checkpoint=True, max_epochs=3, callbacks=[StopAt(stop_at)] if stop_at else [], **settings
    )  # fmt: skip
    loader = DataLoader(packed, batch_size=2, shuffle=True)
    made.fit(model, packed_step, loader, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_a_run_on_packed_rows_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(str(tmp_path / "stopped"), stop_at=7)
    assert_same(run(str(tmp_path / "stopped")), run(str(tmp_path / "whole")))


def test_micro_batches_of_rows_change_nothing(tmp_path: Path) -> None:
    whole, parts = run(str(tmp_path / "a")), run(str(tmp_path / "b"), micro_batch_size=1)
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lengths", [None, [1, 3, 1]])
def test_a_document_of_one_token_has_nothing_to_predict_and_is_left_out(lengths: list[int] | None) -> None:
    packed = Packed([[7], [1, 2, 3], [8]], 4, lengths=lengths)
    assert [row["tokens"].tolist() for row in packed] == [[1, 2, 0, 0]]
    assert packed[0]["targets"].tolist() == [2, 3, -100, -100]


def test_documents_may_be_mapped_from_a_file(tmp_path: Path) -> None:
    np.arange(40, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", np.uint16, mode="r")
    row = Packed([tokens[:6], tokens[6:15]], 16)[0]
    assert row["tokens"].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 0, 0, 0]
    assert row["targets"].dtype == torch.int64


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Packed([[1], []], 8), "nothing to predict"),
        (lambda: Packed([[1, 2]], 0), "at least 1 token"),
        (lambda: Packed([[1, 2]], 8, lengths=[2, 3]), "1 documents, and 2 lengths"),
        (
            lambda: Packed([[1, 2], [], [3]], 8, lengths=[2, 0, 1]),
            r"lengths\[1\] is 0, .* at least 1. Leave empty documents out",
        ),
        (lambda: Packed([[1, 2], [1, 2]], 8, lengths=[2, -1]), r"lengths\[1\] is -1, .* leave `lengths` out, and each"),
        (lambda: Packed([[1, 2]], 8, lengths=[5])[0], "Document 0 has 2 tokens, .* one of 5"),
        (lambda: Packed(texts([5, 30, 17]), 64, lengths=[5, 30, 10])[0], "Document 2 has 17 tokens, .* one of 10"),
        (lambda: Packed([torch.tensor([1.9, 2.9, 3.9])], 8), "Document 0 is of torch.float32"),
        (lambda: Packed([np.array([1.9, 2.9])], 8), "Document 0 is of float64"),
        (lambda: Packed([[1, 2], [1.9, 2.9]], 8), "Document 1 is of float64"),
        (lambda: Packed([[1, 2.5]], 8)[0], "Document 0 is of float64"),
        (lambda: Packed(["some text"], 8), "Document 0 is a str"),
        (lambda: Packed([["some", "text"]], 8), "Document 0 is of <U4"),
        (lambda: Packed([iter([1, 2])], 8), "Document 0 is a list_iterator"),
        (lambda: Packed(cast(Any, iter([[1, 2]])), 8), "given a list_iterator"),
        (lambda: Packed([torch.ones(1, 4, dtype=torch.int64)], 8), "Tensor of 2 dimensions"),
        (lambda: Packed([[[1, 2], [3, 4]]], 8), "of 2 dimensions"),
        (lambda: Packed(cast(Any, torch.arange(9)), 8), "Tensor of 0 dimensions"),
        (lambda: Packed([{"input_ids": [1, 2, 3]}], 8), r"Packed\(\[item\['input_ids'\] for"),
        (lambda: Packed([{"mask": [1], "input_ids": [1, 2, 3]}], 8), "mapping of 'mask', 'input_ids'"),
    ],
)
def test_what_cannot_be_packed_is_named(make: Any, said: str) -> None:
    with pytest.raises(sheer.DataError, match=said):
        make()


def offsets(starts: Tensor) -> Tensor:
    return sheer.document_offsets(starts, 4)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (sheer.document_mask, "document_mask takes `documents`"),
        (sheer.document_block_mask, "document_block_mask takes `documents`"),
        (offsets, "document_offsets takes `starts`"),
    ],
)
@pytest.mark.parametrize("shape", [(4,), (2, 1, 4)])
def test_documents_that_are_no_rows_of_a_batch_are_refused_by_name(function: Any, said: str, shape: Any) -> None:
    with pytest.raises(StepError) as raised:
        function(torch.zeros(shape, dtype=torch.int32))
    assert str(raised.value).startswith(f"{said} of a whole batch, two dimensions, as")
    assert f"and not the shape {list(shape)}. (One row alone is " in str(raised.value)
