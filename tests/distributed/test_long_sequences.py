"""Ranks that share each sequence, alone and with other ways of dividing a run, train as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import sheer
from tests.distributed.task import assert_same, train
from tests.ranks import run_on_ranks

WORDS, WIDTH, HEADS, LENGTH = 13, 16, 2, 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        q, k = q * turn, k * turn
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Language(nn.Module):
    """A model whose buffer says where a token stands."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)
        angles = torch.arange(2 * LENGTH)[:, None] / torch.linspace(1, 9, WIDTH // HEADS)
        self.register_buffer("turn", angles.cos(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x, self.turn[: tokens.shape[1]])
        logits: Tensor = self.head(x)
        return logits


def sentences(dataset: Any) -> Any:
    tokens = torch.randint(WORDS, (40, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    return DataLoader(list(zip(tokens[:, :-1], tokens[:, 1:], strict=True)), batch_size=8, shuffle=False)  # type: ignore[arg-type]


def token_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    """A loss over the tokens that are not 0, so that each rank counts another number."""
    losses = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none")
    return {"loss": sheer.mean(losses, batch[1].flatten() != 0)}


def plain_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    return {"loss": F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())}


def tensor_parallel() -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}


def run(parallel: Any, folder: str, by_token: bool = True) -> dict[str, Any]:
    plan = tensor_parallel() if getattr(parallel, "tp", 1) > 1 else None
    return train(
        parallel,
        plan=plan,
        folder=folder,
        make=Language,
        run_step=token_step if by_token else plain_step,
        loader=sentences,
        val_loader=sentences,
        gradient_clip_val=0.5,
        micro_batch_size=None if by_token else 3,
        max_steps=20 if by_token else 6,  # an epoch has 5
    )


def runs(parallel: Any, folder: str) -> list[dict[str, Any]]:
    return [run(parallel, f"{folder}/token"), run(parallel, f"{folder}/plain", by_token=False)]


SHARED = {"seq_dim": 1, "cp_buffers": ("turn",)}
WAYS = {
    "CP": (2, sheer.Parallel(cp=2, dp_shard=1, **SHARED)),
    "CP x FSDP2": (4, sheer.Parallel(cp=2, **SHARED)),
    "CP x DDP": (4, sheer.Parallel(cp=2, dp_shard=1, dp_replicate=2, **SHARED)),
    "CP x TP x FSDP2": (8, sheer.Parallel(cp=2, tp=2, **SHARED)),
}


@pytest.mark.parametrize("way", WAYS)
def test_sequences_shared_by_ranks_are_trained_on_as_whole_ones(way: str) -> None:
    ranks, parallel = WAYS[way]
    one = runs("auto", "one")
    for many in run_on_ranks(ranks, runs, parallel, "many", timeout=200):
        for expected, found in zip(one, many, strict=True):
            assert_same(expected, found, logged=1e-10, weights=1e-8)


def without_attention() -> None:
    with pytest.raises(sheer.StepError, match=r"called no F\.scaled_dot_product_attention"):
        train(sheer.Parallel(cp=2, dp_shard=1, seq_dim=1), make=lambda: nn.Linear(6, 5), loader=flat, val_loader=flat)


def flat(dataset: Any) -> Any:
    return DataLoader(dataset, batch_size=16)


def test_a_model_without_attention_is_refused() -> None:
    run_on_ranks(2, without_attention)
