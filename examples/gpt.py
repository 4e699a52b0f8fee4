"""A small GPT that learns to write Python, from the source of Python's own standard library. About two minutes on two cores.

Ctrl-C stops it and saves; the same command again goes on where it was.
"""

from __future__ import annotations

import json
import math
import sysconfig
import zlib
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import sheer

CONTEXT, WIDTH, HEADS, LAYERS = 128, 128, 4, 4
RUN_DIR = Path("runs/gpt")


def read_library() -> tuple[str, str]:
    """Return the source of the standard library, split by file into training and validation."""
    train, val = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        (val if zlib.crc32(path.name.encode()) % 24 == 0 else train).append(path.read_text("utf-8", errors="replace"))
    return "\n".join(train), "\n".join(val)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of CONTEXT characters, each with the characters that follow."""

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    def __len__(self) -> int:
        return (len(self.codes) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.codes[index * CONTEXT : (index + 1) * CONTEXT + 1]
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, WIDTH]
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # [batch, HEADS, time, WIDTH / HEADS]
            for part in self.qkv(self.before_attention(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters, bias=False)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:  # [batch, time] -> [batch, time, characters]
        positions = torch.arange(codes.shape[1], device=codes.device)
        return self.head(self.norm(self.blocks(self.characters(codes) + self.positions(positions))))

    @torch.no_grad()
    def write(self, codes: Tensor, count: int) -> Tensor:
        """Continue [1, time] by `count` characters, each drawn from what the model expects."""
        for _ in range(count):
            probabilities = F.softmax(self(codes[:, -CONTEXT:])[:, -1] / 0.8, dim=-1)
            codes = torch.cat([codes, torch.multinomial(probabilities, 1)], dim=1)
        return codes


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    codes, following = batch
    return F.cross_entropy(model(codes).flatten(0, 1), following.flatten())


def unigram_loss(train: Tensor, val: Tensor, characters: int) -> float:
    """Return the loss of a model that only knows how frequent each character is (nats a character)."""
    counts = torch.bincount(train, minlength=characters) + 1.0
    return F.nll_loss((counts / counts.sum()).log().expand(len(val), -1), val).item()


def draw_curves(records: list[dict[str, float]], unigram: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in ("train/loss", "val/loss"):
        points = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points, strict=True), label=name, marker="o" if name == "val/loss" else None)
    axes.axhline(unigram, color="grey", linestyle=":", label="unigram model")
    axes.set(xlabel="step", ylabel="loss (nats a character)", title="A GPT on Python's standard library")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    sheer.seed_everything(0)
    train_text, val_text = read_library()
    letters = [letter for letter, count in Counter(train_text).most_common() if count >= 100]
    code_of = {letter: code for code, letter in enumerate(letters, start=1)}  # 0 stands for all others
    train, val = (torch.tensor([code_of.get(letter, 0) for letter in text]) for text in (train_text, val_text))
    unigram = unigram_loss(train, val, len(letters) + 1)
    print(f"{len(train):,} characters to train on, {len(val):,} to validate; a unigram model's loss is {unigram:.3f}")

    model = GPT(len(letters) + 1)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    trainer = sheer.Trainer(
        max_steps=600,
        gradient_clip_val=1.0,
        log_every_n_steps=20,
        validate_every_n_steps=100,
        monitor="val/loss",
        checkpoint=sheer.Checkpoint(every_n_steps=100),
        callbacks=[sheer.LearningRateMonitor(), sheer.Throughput(tokens=CONTEXT)],
        loggers=[sheer.TensorBoard()],
        run_dir=RUN_DIR,
        resume="auto",
    )
    result = trainer.fit(
        model,
        step,
        DataLoader(Windows(train), batch_size=32, shuffle=True),
        DataLoader(Windows(val), batch_size=64),
        optimizer=torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95)),
        scheduler=sheer.warmup_cosine(warmup_steps=50, final_factor=0.05),
    )

    sheer.load_weights(model, result.run_dir)
    model.eval()
    prompt = "def "
    codes = model.write(torch.tensor([[code_of[letter] for letter in prompt]], device=trainer.device), 400)
    print("\n" + "".join(letters[code - 1] if code else "?" for code in codes[0].tolist()) + "\n")

    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    draw_curves(records, unigram, result.run_dir / "curves.png")
    loss = result.metrics["val/loss"]
    print(f"validation loss {loss:.3f} ({loss / math.log(2):.2f} bits a character); unigram model {unigram:.3f}")
    print(f"curves:       {result.run_dir / 'curves.png'}")
    print(f"metrics:      {result.run_dir / 'metrics.jsonl'}")
    print(f"checkpoints:  {result.run_dir / 'checkpoints'}  (best: {result.best})")
    print(f"TensorBoard:  tensorboard --logdir {result.run_dir}")


if __name__ == "__main__":
    main()
