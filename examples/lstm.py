"""An LSTM tells which of three waves a series of any length is: packed sequences, and a metric over whole series. About ten seconds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset

import sheer

KINDS = ("sine", "square", "saw")


class Waves(Dataset[tuple[Tensor, int]]):
    """Noisy waves of 10 to 60 time steps; each is made when it is asked for, always the same."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_000 + index)
        kind = index % len(KINDS)
        length = int(torch.randint(10, 61, (), generator=generator))
        shift, speed = torch.rand(2, generator=generator).tolist()
        phase = shift * 2 * math.pi + torch.arange(length) * (0.3 + 0.5 * speed)
        wave = (phase.sin(), phase.sin().sign(), 1 - (phase / math.pi) % 2)[kind]
        return (wave + 0.3 * torch.randn(length, generator=generator)).unsqueeze(1), kind


def collate(samples: list[tuple[Tensor, int]]) -> tuple[PackedSequence, Tensor]:
    series, kinds = zip(*samples, strict=True)
    return pack_sequence(list(series), enforce_sorted=False), torch.tensor(kinds)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 32)
        self.head = nn.Linear(32, len(KINDS))

    def forward(self, series: PackedSequence) -> Tensor:  # -> [batch, kinds]
        _, (last, _) = self.lstm(series)
        return self.head(last[-1])


class Recall:
    """The mean recall over the kinds: it needs all series, so it is a metric object, not a mean of batches."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.confusion = torch.zeros(len(KINDS), len(KINDS), dtype=torch.long)

    def update(self, predicted: Tensor, true: Tensor) -> Recall:
        pairs = (true * len(KINDS) + predicted).cpu()
        self.confusion += torch.bincount(pairs, minlength=len(KINDS) ** 2).view(len(KINDS), -1)
        return self

    def compute(self) -> float:
        return float((self.confusion.diag() / self.confusion.sum(1).clamp(min=1)).mean())


recall = Recall()


def step(model: nn.Module, batch: tuple[PackedSequence, Tensor]) -> Any:
    series, kinds = batch
    logits = model(series)
    return {"loss": F.cross_entropy(logits, kinds), "accuracy": (logits.argmax(-1) == kinds).float().mean()}


def eval_step(model: nn.Module, batch: tuple[PackedSequence, Tensor]) -> Any:
    series, kinds = batch
    logits = model(series)
    return {"loss": F.cross_entropy(logits, kinds), "recall": recall.update(logits.argmax(-1), kinds)}


def main() -> None:
    sheer.seed_everything(0)
    model = Classifier()
    trainer = sheer.Trainer(
        max_epochs=10,
        gradient_clip_val=1.0,
        monitor="val/recall",
        monitor_mode="max",
        run_dir="runs/lstm",
        resume="auto",
    )
    result = trainer.fit(
        model,
        step,
        DataLoader(Waves(1920, seed=0), batch_size=32, shuffle=True, collate_fn=collate),
        DataLoader(Waves(480, seed=1), batch_size=96, collate_fn=collate),
        eval_step=eval_step,
        optimizer=torch.optim.Adam(model.parameters(), lr=5e-3),
        scheduler=sheer.warmup_cosine(warmup_steps=20),
    )
    print(f"mean recall over the kinds: {result.metrics['val/recall']:.3f}")


if __name__ == "__main__":
    main()
