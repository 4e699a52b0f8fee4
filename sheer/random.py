"""The random states of this process: seeded together, saved together, restored together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sheer.errors import SettingsError


def seed_everything(seed: int) -> int:
    """Seed Python, NumPy and PyTorch (all devices), and thereby the order of the training data. Returns the seed.

    Call it before anything random is built. The workers of a loader need nothing more: each sample is seeded from this
    seed, the epoch and its index.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise SettingsError(f"A seed is a whole number from 0 to 2**32 - 1, not {seed!r}.")
    seed_process(seed)
    return seed


def seed_process(seed: int) -> None:
    """Seed all generators of this process with a number of up to 64 bits."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def seed_sample(seed: int) -> None:
    """Seed what a dataset may draw from in a worker: a few microseconds, where `torch.manual_seed` takes 170."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def snapshot() -> tuple[Any, Any, Any, Any]:
    """Take the states of all generators of this process as they come: cheap enough for every step."""
    accelerator = torch.get_device_module().get_rng_state_all() if torch.accelerator.is_available() else None
    return random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state(), accelerator


def random_state(taken: tuple[Any, Any, Any, Any] | None = None) -> dict[str, Any]:
    """Return the states of all generators of this process, now or at a snapshot."""
    python, numpy, default, accelerator = taken or snapshot()
    return {"python": python, "numpy": numpy, "torch": default, "accelerator": accelerator}


def set_random_state(state: dict[str, Any]) -> None:
    """Put all generators of this process back into a state that `random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys), *rest))
    torch.set_rng_state(state["torch"])
    if state["accelerator"] is not None and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state_all(state["accelerator"])


def states_of(generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Return the states of all generators of this process, and of those that a user made beside them."""
    return {"process": random_state(), "generators": [generator.get_state() for generator in generators]}


def set_states_of(generators: Sequence[torch.Generator], states: dict[str, Any]) -> None:
    """Put all generators back into the states that `states_of` returned."""
    set_random_state(states["process"])
    set_generators(generators, states["generators"])


def set_generators(generators: Sequence[torch.Generator], states: Sequence[torch.Tensor]) -> None:
    """Put generators back into their states."""
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


class Before:
    """The states of the generators that a step may draw from, as they were before it.

    Attributes:
        generators: the host's, and the device's.
        states: theirs.
    """

    def __init__(self, device: torch.device) -> None:
        all_devices = getattr(torch.get_device_module(device), "default_generators", ())
        self.generators = (torch.default_generator, *all_devices[device.index or 0 :][:1])
        self.states: list[torch.Tensor] = []

    def take(self) -> None:
        """Take the states as they are."""
        self.states = list(map(torch.Generator.get_state, self.generators))


def state_before(device: torch.device) -> Before | None:
    """Return what takes the states before each step on a device; None for the CPU, where no step runs out of a device's memory."""
    return None if device.type == "cpu" else Before(device)
