"""A GAN that learns a ring of eight points: two networks, two optimizers, one step counts once. About fifteen seconds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sheer

NOISE, WIDTH = 8, 128


class GAN(nn.Module):
    """Both networks are one module: all of it is moved, saved and resumed together."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2)
        )
        self.critic = nn.Sequential(
            nn.Linear(2, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, 1)
        )

    def generate(self, count: int) -> Tensor:
        """Make points, [count, 2]."""
        return self.generator(torch.randn(count, NOISE, device=next(self.parameters()).device))


def critic_step(gan: GAN, batch: tuple[Tensor]) -> dict[str, Tensor]:
    real = batch[0].requires_grad_()
    judged = gan.critic(real)
    fake = gan.generate(len(real)).detach()
    (slope,) = torch.autograd.grad(judged.sum(), real, create_graph=True)
    penalty = slope.square().sum(1).mean()  # R1: Mescheder, Geiger and Nowozin, 2018
    loss = F.softplus(-judged).mean() + F.softplus(gan.critic(fake)).mean() + 0.05 * penalty
    return {"loss": loss, "penalty": penalty}


def generator_step(gan: GAN, batch: tuple[Tensor]) -> Tensor:
    return F.softplus(-gan.critic(gan.generate(len(batch[0])))).mean()


def ring(count: int) -> tuple[Tensor, Tensor]:
    """Return the eight centres [8, 2] and `count` points [count, 2] around them."""
    angles = torch.arange(8) * (2 * math.pi / 8)
    centres = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return centres, centres[torch.randint(8, (count,))] + 0.05 * torch.randn(count, 2)


def modes_step(gan: GAN, batch: tuple[Tensor]) -> dict[str, Tensor]:
    """How many of the eight points are hit, and how far the made points are from the nearest one."""
    centres = batch[0]
    nearest = torch.cdist(gan.generate(1000), centres).min(dim=1)
    hit = torch.bincount(nearest.indices[nearest.values < 0.3], minlength=8) >= 20
    return {"modes": hit.sum(), "distance": nearest.values.mean()}


def main() -> None:
    sheer.seed_everything(0)
    centres, points = ring(8192)
    gan = GAN()
    trainer = sheer.Trainer(max_steps=2000, log_every_n_steps=500, run_dir="runs/gan", resume="auto")
    critic = torch.optim.Adam(gan.critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
    generator = torch.optim.Adam(gan.generator.parameters(), lr=1e-3, betas=(0.0, 0.9))

    run = trainer.start(gan, optimizers={"critic": critic, "generator": generator})
    for batch in run.steps(DataLoader(TensorDataset(points), batch_size=256, shuffle=True)):
        run.update(critic, critic_step, batch)
        run.update(generator, generator_step, batch)
        if run.step % 500 == 0:
            run.evaluate(modes_step, [(centres,)])
    result = run.finish()
    print(f"after {result.step} steps {result.metrics['val/modes']:.0f} of 8 points are hit")


if __name__ == "__main__":
    main()
