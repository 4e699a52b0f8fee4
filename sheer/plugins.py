"""What a trainer holds besides its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from sheer.console import Console
from sheer.loggers.base import Logger


@dataclass(frozen=True)
class Plugins:
    """Objects, which cannot be written down."""

    callbacks: Sequence[object] = ()
    loggers: Sequence[Logger | Console] = ()
    hparams: Any = None
    mesh: DeviceMesh | None = None  # of ranks, made by the user
