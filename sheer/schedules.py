"""Ready schedules of the learning rate: each is a function of (optimizer, total steps), as `fit(scheduler=...)` takes one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sheer.errors import SettingsError

Schedule = Callable[[Optimizer, int], LambdaLR]  # what `fit(scheduler=...)` takes


def warmup_cosine(warmup_steps: int, final_factor: float = 0.0) -> Schedule:
    """Rise linearly over `warmup_steps`, then fall along half a cosine to `final_factor` of the rate (Loshchilov, Hutter 2017)."""
    check_schedule(warmup_steps, final_factor)
    return functools.partial(_scheduler, functools.partial(cosine_factor, warmup=warmup_steps, final=final_factor))


def warmup_linear(warmup_steps: int, final_factor: float = 0.0) -> Schedule:
    """Rise linearly over `warmup_steps`, then fall linearly to `final_factor` of the rate."""
    check_schedule(warmup_steps, final_factor)
    return functools.partial(_scheduler, functools.partial(linear_factor, warmup=warmup_steps, final=final_factor))


def warmup_stable_decay(warmup_steps: int, decay_steps: int, final_factor: float = 0.0) -> Schedule:
    """Rise over `warmup_steps`, stay, and fall linearly over the last `decay_steps` (WSD; Hu et al. 2024, MiniCPM)."""
    check_schedule(warmup_steps, final_factor)
    if decay_steps < 0:
        raise SettingsError(f"decay_steps must be at least 0, not {decay_steps}.")
    factor = functools.partial(stable_decay_factor, warmup=warmup_steps, decay=decay_steps, final=final_factor)
    return functools.partial(_scheduler, factor)


def cosine_factor(step: int, *, total: int, warmup: int, final: float) -> float:
    """Return what the rate is multiplied by in a step (counted from 0) of `warmup_cosine`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    part = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * part))


def linear_factor(step: int, *, total: int, warmup: int, final: float) -> float:
    """Return what the rate is multiplied by in a step (counted from 0) of `warmup_linear`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    part = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1 + (final - 1) * part


def stable_decay_factor(step: int, *, total: int, warmup: int, decay: int, final: float) -> float:
    """Return what the rate is multiplied by in a step (counted from 0) of `warmup_stable_decay`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    part = min(1.0, max(0.0, (step - (total - decay)) / max(1, decay)))
    return 1 + (final - 1) * part


def _scheduler(factor: Callable[..., float], optimizer: Optimizer, total_steps: int) -> LambdaLR:
    return LambdaLR(optimizer, functools.partial(factor, total=total_steps))


def check_schedule(warmup_steps: int, final_factor: float) -> None:
    """Raise `SettingsError` for what no schedule can be made of."""
    if warmup_steps < 0:
        raise SettingsError(f"warmup_steps must be at least 0, not {warmup_steps}.")
    if not 0.0 <= final_factor <= 1.0:
        raise SettingsError(f"final_factor is a share of the rate, from 0 to 1, not {final_factor}.")


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a parameter group; one that is a tensor stays the same tensor, which a captured graph may read."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
