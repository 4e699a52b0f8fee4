"""How long it takes until the first batch, at the beginning of 10⁸ samples and behind 10³ and 10⁷ of them.

python benchmarks/resume.py
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from sheer.data.choose import make_source

SAMPLES, BATCH, REPEATS = 100_000_000, 10, 20


class Made(Dataset[Any]):
    """Samples that are made when they are asked for."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(index)


def seconds_to_first_batch(position: int) -> float:
    """Return how long it takes from the loader to the first batch behind so many samples, the median of some tries."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        source = make_source(
            DataLoader(Made(), batch_size=BATCH, shuffle=True),
            seed=1, device=torch.device("cpu"), resume_by_skipping=False, same_epoch=False, ranks=None,
        )  # fmt: skip
        next(source.epoch(0, position // BATCH))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {SAMPLES:,} samples shuffled, batches of {BATCH}, median of {REPEATS}")
    for position in (0, 1_000, 10_000_000):
        print(f"behind {position:>10,} samples: first batch after {1000 * seconds_to_first_batch(position):.2f} ms")
