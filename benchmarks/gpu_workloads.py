"""What benchmarks/gpu.py trains: a small CNN, a small transformer, an MLP (the floor), a GPT of 124M and a Llama shape of 1B parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """A network over pictures or vectors, 10 classes."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def mlp() -> nn.Module:
    return Classifier(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))


def cnn() -> nn.Module:
    """About 1M parameters: eight convolutions with batch norms, in four stages."""
    layers: list[nn.Module] = []
    before = 3
    for width, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (192, 2), (192, 1)):
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return Classifier(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)))


@dataclass(frozen=True)
class Shape:
    """Of a decoder."""

    vocab: int
    time: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    llama: (
        bool  # RMSNorm, SwiGLU and rotary positions; else LayerNorm, GELU and learned positions, with tied embeddings
    )


TINY = Shape(128, 128, 128, 4, 4, 4, 512, False)
GPT = Shape(50_304, 1024, 768, 12, 12, 12, 3072, False)
LLAMA = Shape(128_256, 4096, 2048, 16, 32, 8, 8192, True)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = shape.heads, shape.kv_heads, shape.width // shape.heads
        self.qkv = nn.Linear(shape.width, (shape.heads + 2 * shape.kv_heads) * self.size, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor | None) -> Tensor:  # [batch, time, width]
        heads = self.qkv(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if turn is not None:
            q, k = rotated(q, turn), rotated(k, turn)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(attended.transpose(1, 2).flatten(2))


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Turn pairs of numbers by their positions (RoPE, arXiv:2104.09864); `turn` has cosines and sines, [2, time, size / 2]."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * turn[0] - b * turn[1], b * turn[0] + a * turn[1]], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        norm = nn.RMSNorm if shape.llama else nn.LayerNorm
        self.before_attention, self.before_mlp = norm(shape.width), norm(shape.width)
        self.attention = Attention(shape)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False) if shape.llama else None
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor | None) -> Tensor:
        x = x + self.attention(self.before_attention(x), turn)
        y = self.before_mlp(x)
        inside = F.gelu(self.up(y), approximate="tanh") if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        return x + self.down(inside)


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab, shape.width)
        self.positions = None if shape.llama else nn.Embedding(shape.time, shape.width)
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape.layers)])
        self.norm = (nn.RMSNorm if shape.llama else nn.LayerNorm)(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        if not shape.llama:
            self.head.weight = self.tokens.weight
        size = shape.width // shape.heads
        angles = torch.outer(torch.arange(shape.time), 500_000 ** -(torch.arange(0, size, 2) / size))
        self.register_buffer(
            "turn", torch.stack([angles.cos(), angles.sin()]) if shape.llama else None, persistent=False
        )

    def forward(self, codes: Tensor) -> Tensor:  # [batch, time] -> [batch, time, vocab]
        x = self.tokens(codes)
        if self.positions is not None:
            x = x + self.positions(torch.arange(codes.shape[1], device=codes.device))
        for block in self.blocks:
            x = block(x, self.turn)
        return self.head(self.norm(x))


def step(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss: cross-entropy, whatever is classified."""
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@dataclass(frozen=True)
class Workload:
    """A model, its batches, and how it is trained."""

    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    precision: str
    steps: tuple[int, int]  # to warm up, to measure
    flops: float = 0.0  # of a step, by 6 N D and causal attention counted at half


def codes(shape: Shape, batch: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return what makes batches of token codes."""

    def make() -> tuple[Tensor, Tensor]:
        text = torch.randint(shape.vocab, (batch, shape.time + 1))
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    return make


def work_of(shape: Shape, batch: int) -> float:
    """Count the operations of a step: 6 for each weight of a matrix and token, and 6 T width for each token and layer of causal attention."""
    kv = shape.width * shape.kv_heads // shape.heads
    block = (
        2 * shape.width * shape.width + 2 * shape.width * kv + (3 if shape.llama else 2) * shape.width * shape.hidden
    )
    weights = shape.layers * block + shape.vocab * shape.width
    return 6.0 * batch * shape.time * (weights + shape.layers * shape.time * shape.width)


WORKLOADS = {
    "MLP": Workload(mlp, lambda: (torch.randn(32, 16), torch.randint(4, (32,))), "32", (30, 1000)),
    "CNN 1M": Workload(cnn, lambda: (torch.randn(64, 3, 32, 32), torch.randint(10, (64,))), "32", (30, 300)),
    "transformer 1M": Workload(lambda: Decoder(TINY), codes(TINY, 64), "bf16", (30, 300)),
    "GPT 124M": Workload(lambda: Decoder(GPT), codes(GPT, 32), "bf16", (10, 30), work_of(GPT, 32)),
    "Llama 1B": Workload(lambda: Decoder(LLAMA), codes(LLAMA, 4), "bf16", (8, 15), work_of(LLAMA, 4)),
}
