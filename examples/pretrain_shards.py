"""Pretraining from memory-mapped shards of tokens under FSDP2: each rank holds a part of the model, and reads its own part of each batch.

sheer run --nproc-per-node 2 examples/pretrain_shards.py

The first start makes the shards, of the standard library's source; a token is a byte.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gpt import CONTEXT, GPT, read_library, step
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

import sheer

SHARDS = Path("runs/shards")
SHARD_SIZE = 2**20  # tokens


def write_shards(folder: Path) -> None:
    unfinished = folder.with_suffix(".unfinished")  # what an earlier start left half done is written over
    unfinished.mkdir(parents=True, exist_ok=True)
    for split, text in zip(("train", "val"), read_library(), strict=True):
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
        for number, start in enumerate(range(0, len(tokens), SHARD_SIZE)):
            tokens[start : start + SHARD_SIZE].tofile(unfinished / f"{split}-{number:04}.bin")
    unfinished.rename(folder)


class Shard(Dataset[tuple[Tensor, Tensor]]):
    """The windows of CONTEXT tokens in a file, each with the tokens that follow."""

    def __init__(self, path: Path) -> None:
        self.tokens = np.memmap(path, np.uint16, mode="r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = torch.from_numpy(self.tokens[index * CONTEXT : (index + 1) * CONTEXT + 1].astype(np.int64))
        return window[:-1], window[1:]


def load(split: str) -> ConcatDataset[tuple[Tensor, Tensor]]:
    return ConcatDataset([Shard(path) for path in sorted(SHARDS.glob(f"{split}-*.bin"))])


def main() -> None:
    sheer.seed_everything(0)
    with sheer.rank_zero_first():
        if not SHARDS.exists():
            write_shards(SHARDS)
    model = GPT(256)
    trainer = sheer.Trainer(
        max_steps=100,
        parallel="fsdp",
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        validate_every_n_steps=50,
        limit_val_batches=8,
        checkpoint=sheer.Checkpoint(every_n_steps=50),
        callbacks=[sheer.Throughput(tokens=CONTEXT)],
        run_dir="runs/pretrain",
        resume="auto",
    )
    result = trainer.fit(
        model,
        step,
        DataLoader(load("train"), batch_size=32, shuffle=True),
        DataLoader(load("val"), batch_size=64),
        optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1),
        scheduler=sheer.warmup_cosine(warmup_steps=20, final_factor=0.1),
    )
    print(f"validation loss {result.metrics['val/loss']:.3f} (nats a byte)")


if __name__ == "__main__":
    main()
