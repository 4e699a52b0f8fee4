"""The GPT of the demo on several ranks, by one script: however they share the work, the loss at the end is the same.

sheer run --nproc-per-node 2 examples/gpt_on_ranks.py --parallel ddp
sheer run --nproc-per-node 2 examples/gpt_on_ranks.py --parallel fsdp
sheer run --nproc-per-node 4 examples/gpt_on_ranks.py --parallel tp2

Less than half a minute each on two cores. Without `sheer run` it trains on one process, to the same loss.
"""

from __future__ import annotations

import argparse

import torch
from gpt import GPT, Windows, read_library, step
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import DataLoader, Subset

import sheer

WAYS = {
    "ddp": "ddp",  # each rank holds the whole model
    "fsdp": "fsdp",  # each holds a part of every parameter
    "tp2": sheer.Parallel(tp=2),  # two ranks share each layer; pairs of them share the parameters, as with fsdp
}
PLAN = {
    "blocks.*.qkv": ColwiseParallel(output_layouts=Replicate()),  # whole again: its columns are not ordered by head
    "blocks.*.out": RowwiseParallel(input_layouts=Replicate()),
    "blocks.*.mlp.0": ColwiseParallel(),
    "blocks.*.mlp.2": RowwiseParallel(),
}
"""How layers are divided where `tp` says that they are."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parallel", choices=WAYS, default="ddp")
    way = parser.parse_args().parallel

    sheer.seed_everything(0)
    train, val = (torch.tensor(list(text.encode())) for text in read_library())
    model = GPT(256)  # bytes
    del model.blocks[2:]  # two of its four blocks do here
    trainer = sheer.Trainer(
        max_steps=40,
        parallel=WAYS[way],
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        validate_every_n_steps=20,
        run_dir=f"runs/gpt-{way}",
        resume="auto",
    )
    result = trainer.fit(
        model,
        step,
        DataLoader(Windows(train), batch_size=32, shuffle=True),  # 32 samples a step, on any number of ranks
        DataLoader(Subset(Windows(val), range(256)), batch_size=64),
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        scheduler=sheer.warmup_cosine(warmup_steps=10),
        parallelize=PLAN,
    )
    print(f"{way} on {trainer.world_size} ranks: validation loss {result.metrics['val/loss']:.4f}")


if __name__ == "__main__":
    main()
