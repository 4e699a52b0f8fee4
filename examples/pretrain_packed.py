"""Pretraining on whole documents, packed into rows: the functions and classes of Python's own standard library, byte by byte.

Attention and positions end with each document, hardly a place in a row is empty, and the logits of all tokens never exist at once.
"""

from __future__ import annotations

import re
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import sheer

LENGTH, WIDTH, HEADS, LAYERS = 256, 96, 4, 2


def read_documents() -> tuple[list[Tensor], list[Tensor]]:
    """Return the functions and classes of the standard library, to train on and to validate."""
    train, val = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for text in re.split(r"\n(?=def |class |@)", path.read_text("utf-8", errors="replace")):
            tokens = torch.tensor(list(text.strip().encode()), dtype=torch.uint8)
            (val if zlib.crc32(text.encode()) % 50 == 0 else train).append(tokens)
    return train, val


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # [batch, LENGTH, WIDTH], [batch, 1, LENGTH, LENGTH]
        q, k, v = (
            p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in self.qkv(self.before_attention(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.02)  # which is also the weight of the output

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:  # -> [batch, LENGTH, WIDTH]
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


def step(model: Model, batch: dict[str, Tensor]) -> sheer.Mean:
    hidden = model(batch["tokens"], batch["positions"], sheer.document_mask(batch["documents"]))
    return sheer.linear_cross_entropy(hidden, model.tokens.weight, batch["targets"])


def main() -> None:
    sheer.seed_everything(0)
    train, val = (sheer.data.Packed(documents, LENGTH) for documents in read_documents())
    print(f"{len(train.documents):,} documents in {len(train):,} rows of {LENGTH}, {train.fill:.2%} full")
    model = Model()
    trainer = sheer.Trainer(
        max_steps=300,
        gradient_clip_val=1.0,
        validate_every_n_steps=100,
        callbacks=[sheer.Throughput(tokens=LENGTH)],
        run_dir="runs/packed",
        resume="auto",
    )
    result = trainer.fit(
        model,
        step,
        DataLoader(train, batch_size=16, shuffle=True),
        DataLoader(val, batch_size=32),
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        scheduler=sheer.warmup_cosine(warmup_steps=30, final_factor=0.1),
    )
    print(f"validation loss {result.metrics['val/loss']:.3f} (nats a byte)")


if __name__ == "__main__":
    main()
