"""What only a GPU can show of the parts of language models: run by hand with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

import sheer
from sheer.data import Packed
from sheer.float8 import is_float8
from tests.task import trainer as trainer_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
LENGTH, HEADS, SIZE = 512, 4, 64


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [900, 300, 77, 512, 40, 250, 3, 180, 400, 129, 35]
    texts = [torch.randint(256, (size,), generator=generator) for size in sizes]
    return {name: value.cuda() for name, value in default_collate(list(Packed(texts, LENGTH))).items()}


def heads(rows: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(rows, HEADS, LENGTH, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]


def by_mask(packed: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sheer.document_mask(packed["documents"]))


def by_blocks(packed: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    mask = torch.compile(sheer.document_block_mask)(packed["documents"])
    return torch.compile(flex_attention)(q, k, v, block_mask=mask)


def by_offsets(packed: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets = sheer.document_offsets(packed["starts"], LENGTH)
    flat = [part.transpose(1, 2).flatten(0, 1) for part in (q, k, v)]
    out = varlen_attn(*flat, offsets, offsets, LENGTH, LENGTH, window_size=(-1, 0))
    return out.unflatten(0, (-1, LENGTH)).transpose(1, 2)


@pytest.mark.parametrize("way", [by_blocks, by_offsets])
def test_every_way_of_attention_keeps_documents_apart(way: Any) -> None:
    packed = batch()
    both = []
    for each in (by_mask, way):
        q, k, v = heads(len(packed["tokens"]))
        out = each(packed, q, k, v)
        (out.float() * torch.linspace(-1, 1, SIZE, device="cuda")).sum().backward()
        both.append([out, q.grad, k.grad, v.grad])
    for one, other in zip(*both, strict=True):
        assert ((one - other).float().norm() / one.float().norm()).item() < 1e-2


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_without_logits_is_that_of_the_logits_in_less_memory(compiled: bool) -> None:
    torch.manual_seed(0)
    tokens, width, classes = 8192, 256, 32_000
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (0.05 * torch.randn(classes, width, device="cuda")).requires_grad_()
    targets = torch.randint(classes, (tokens,), device="cuda")
    targets[::7] = -100
    exact = F.cross_entropy(F.linear(hidden.float(), weight), targets, reduction="sum")
    right = torch.autograd.grad(exact, (hidden, weight))
    loss = torch.compile(sheer.linear_cross_entropy) if compiled else sheer.linear_cross_entropy
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss(hidden, weight, targets, chunk_size=1024).total.backward()  # makes cuBLAS's workspace, and compiles
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if not compiled:
            torch.cuda.set_sync_debug_mode("error")
        own = loss(hidden, weight, targets, chunk_size=1024)
    own.total.backward()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < tokens * classes * 2  # what the logits take in 16 bits
    assert own.count.item() == (targets != -100).sum().item()
    torch.testing.assert_close(own.total, exact, rtol=1e-4, atol=0)
    for mine, theirs in zip((hidden.grad, weight.grad), right, strict=True):
        assert ((mine - theirs).float().norm() / theirs.float().norm()).item() < 1e-2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 128)
        self.blocks = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))
        self.head = nn.Linear(128, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + F.gelu(block(x))
        return x


def step(model: Net, packed: dict[str, Tensor]) -> sheer.Mean:
    return sheer.linear_cross_entropy(model(packed["tokens"]), model.head.weight, packed["targets"], model.head.bias)


@pytest.mark.parametrize("compiled", [False, True])
def test_float8_trains_as_bfloat16_does(compiled: bool, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs float8 products")
    losses = []
    for precision in ("float8-mixed", "bf16-mixed"):
        sheer.seed_everything(0)
        model = Net()
        generator = torch.Generator().manual_seed(0)
        texts = [torch.randint(32, (300,), generator=generator).cumsum(0) % 256 for _ in range(64)]
        loader = DataLoader(Packed(texts, 256), batch_size=8, shuffle=True, drop_last=True)
        made = trainer_of(
            device="cuda", precision=precision, max_steps=30, compile=compiled, run_dir=str(tmp_path / precision)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses.append(made.fit(model, step, loader, loader, optimizer=optimizer).metrics["val/loss"])
        assert sum(map(is_float8, model.modules())) == (3 if precision == "float8-mixed" else 0)
    assert losses[0] == pytest.approx(losses[1], rel=5e-2) and losses[0] != losses[1]
