"""Seeding."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def plain_seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, and thereby the order of the training data."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def plain_set_random_state(state: dict[str, Any]) -> None:
    """Put all generators of this process back into a state that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["accelerator"] is not None and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state_all(state["accelerator"])
