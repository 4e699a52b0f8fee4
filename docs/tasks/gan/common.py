"""What the scripts of this task share: the networks, their losses, the data and the measure of quality."""

import math
import os

import torch
from torch import nn
from torch.nn import functional as F

EPOCHS = int(os.environ.get("TASK_EPOCHS", "30"))
NOISE, WIDTH = 8, 64


class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 2),
        )
        self.critic = nn.Sequential(
            nn.Linear(2, WIDTH),
            nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, WIDTH),
            nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, 1),
        )

    def generate(self, count):
        return self.generator(torch.randn(count, NOISE, device=next(self.parameters()).device))

    def critic_loss(self, real):
        real = real.requires_grad_()
        judged, fake = self.critic(real), self.generate(len(real)).detach()
        (slope,) = torch.autograd.grad(judged.sum(), real, create_graph=True)
        penalty = slope.square().sum(1).mean()
        return F.softplus(-judged).mean() + F.softplus(self.critic(fake)).mean() + 0.05 * penalty

    def generator_loss(self, count):
        return F.softplus(-self.critic(self.generate(count))).mean()

    def distance(self, centres):
        """Return how far 1000 made points are from the nearest centre each, on average."""
        return torch.cdist(self.generate(1000), centres).min(dim=1).values.mean()


def load_data():
    """Return eight centres [8, 2] and 4096 points [2] around them."""
    angles = torch.arange(8) * (2 * math.pi / 8)
    centres = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return centres, centres[torch.randint(8, (4096,))] + 0.05 * torch.randn(4096, 2)
