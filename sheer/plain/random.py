"""Seeding."""

from __future__ import annotations

import random

import numpy as np
import torch


def plain_seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, and thereby the order of the training data."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
