"""A small transformer whose sizes do not divide, planned and trained by the tests: `trained.py WAY`."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sheer
from sheer.console import silent_console
from tests.plan.measure import MEASURE

WIDTH, HEADS, TIME, LETTERS = 36, 2, 48, 67

WAYS = {
    "alone": {},
    "alone in bf16-mixed": {"precision": "bf16-mixed"},
    "alone in micro-batches": {"micro_batch_size": 3, "accumulate_grad_batches": 2},
    "ddp": {"parallel": "ddp"},
    "ddp in micro-batches": {"parallel": "ddp", "micro_batch_size": 2, "accumulate_grad_batches": 2},
    "fsdp": {"parallel": "fsdp"},
    "fsdp in micro-batches": {"parallel": "fsdp", "precision": "bf16-true", "micro_batch_size": 2},
    "fsdp kept after forward": {"parallel": sheer.Parallel(reshard_after_forward=False), "precision": "64-true"},
    "hsdp": {"parallel": sheer.Parallel(dp_replicate=2)},
    "tp": {"parallel": sheer.Parallel(tp=2)},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down, self.dropout = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, WIDTH]
        y = self.before_attention(x)
        q, k, v = (part(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.dropout(self.down(F.gelu(self.up(self.before_mlp(x)))))


class Net(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(LETTERS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, LETTERS, bias=False)
        self.head.weight = self.letters.weight
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.letters(codes) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor | sheer.Mean]:
    losses = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none")
    return {"loss": sheer.mean(losses, batch[1].flatten() > 2)}


def tensor_plan() -> dict[str, object]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    columns = dict.fromkeys((f"blocks.*.{name}" for name in ("q", "k", "v", "up")), ColwiseParallel())
    return columns | dict.fromkeys(("blocks.*.out", "blocks.*.down"), RowwiseParallel())


if __name__ == "__main__":
    sheer.seed_everything(0)
    codes = torch.randint(LETTERS, (80, TIME + 1))
    model = Net()
    trainer = sheer.Trainer(
        max_steps=6,
        gradient_clip_val=1.0,
        checkpoint=False,
        callbacks=[MEASURE],
        loggers=[silent_console()],
        **WAYS[sys.argv[1]],  # type: ignore[arg-type]
    )
    trainer.fit(
        model,
        step,
        DataLoader(TensorDataset(codes[:, :-1].clone(), codes[:, 1:].clone()), batch_size=10, shuffle=True),
        optimizer=torch.optim.AdamW(model.parameters(), foreach=sys.argv[1].partition(" ")[0] in ("alone", "ddp")),
        parallelize=tensor_plan() if sys.argv[1] == "tp" else None,
    )
