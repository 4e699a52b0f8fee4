"""What the scripts of this task share: the model and the data."""

import argparse
import inspect
import math
import os

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

EPOCHS = int(os.environ.get("TASK_EPOCHS", "4"))
CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):  # [batch, time, WIDTH]
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.before_attention(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    def __init__(self, characters):
        super().__init__()
        self.characters, self.positions = (
            nn.Embedding(characters, WIDTH),
            nn.Embedding(CONTEXT, WIDTH),
        )
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, codes):  # [batch, time] -> [batch, time, characters]
        positions = torch.arange(codes.shape[1], device=codes.device)
        return self.head(self.norm(self.blocks(self.characters(codes) + self.positions(positions))))

    def groups(self):
        """Return the groups of parameters: matrices decay, the others do not."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        others = [p for p in self.parameters() if p.dim() < 2]
        return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def loss_of(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def warmup_cosine(optimizer, warmup_steps, total_steps):
    def factor(step):
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        part = (step - warmup_steps) / (total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))

    return LambdaLR(optimizer, factor)


def load_data():
    """Return windows to train on and to validate on, and the number of characters."""
    text = inspect.getsource(argparse)
    code_of = {letter: code for code, letter in enumerate(sorted(set(text)))}
    codes = torch.tensor([code_of[letter] for letter in text])
    windows = [
        {"codes": window[:-1], "labels": window[1:]}
        for window in codes.unfold(0, CONTEXT + 1, CONTEXT)
    ]
    return (
        [window for number, window in enumerate(windows) if number % 8],
        windows[::8],
        len(code_of),
    )
