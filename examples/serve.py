"""Uses what examples/digits.py left, with PyTorch and safetensors alone: this script cannot import sheer."""

from __future__ import annotations

import sys

sys.modules["sheer"] = None  # type: ignore[assignment]  # an import of it would be an error from here on

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
model.load_state_dict(load_file("runs/digits/checkpoints/best/model.safetensors"))
model.eval()

digits = load_digits()
with torch.no_grad():
    guessed = model(torch.tensor(digits.data[:10] / 16, dtype=torch.float32)).argmax(-1)
print("guessed:", guessed.tolist())
print("true:   ", digits.target[:10].tolist())
