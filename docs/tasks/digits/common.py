"""What the scripts of this task share: the model and the data."""

import os

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import random_split

EPOCHS = int(os.environ.get("TASK_EPOCHS", "10"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10)
        )

    def forward(self, pixels):
        return self.layers(pixels)


def load_data():
    """Return what to train on and what to validate on: pixels [64] and a label each."""
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)
    samples = [
        {"pixels": x, "labels": y} for x, y in zip(pixels, torch.tensor(digits.target), strict=True)
    ]
    return random_split(samples, [1447, 350])
