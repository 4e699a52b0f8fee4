"""Log how the device and the host are used."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from sheer.events import RunInfo


class DeviceStats:
    """Logs memory and use of the accelerator, and of the host, as they are at each log point.

    `device/memory_gib` (tensors now), `device/memory_peak_gib` (most since the last log point) and `device/memory_reserved_gib` come
    from PyTorch's allocator; on NVIDIA GPUs, with the package nvidia-ml-py, `device/utilization_percent`, `device/power_watts` and
    `device/temperature_celsius`. Of the host `host/cpu_percent` (all cores, since the last log point), `host/memory_percent`, and
    `host/process_memory_gib` (resident, of this process).

    Args:
        host: log the host's figures too.
    """

    def __init__(self, *, host: bool = True) -> None:
        self.host = host
        self._device = torch.device("cpu")
        self._has_nvml = False

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        """Find out what can be read, and start the counts that are relative to the last reading."""
        self._device = info.device
        self._has_nvml = info.device.type == "cuda" and importlib.util.find_spec("pynvml") is not None
        if self.host:
            import psutil

            psutil.cpu_percent()

    def on_log(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        """Return the figures."""
        logged: dict[str, float] = {}
        if self._device.type != "cpu":
            logged["device/memory_gib"] = torch.accelerator.memory_allocated(self._device) / 2**30
            logged["device/memory_peak_gib"] = torch.accelerator.max_memory_allocated(self._device) / 2**30
            logged["device/memory_reserved_gib"] = torch.accelerator.memory_reserved(self._device) / 2**30
            torch.accelerator.reset_peak_memory_stats(self._device)
        if self._has_nvml:
            logged["device/utilization_percent"] = float(torch.cuda.utilization(self._device))
            logged["device/power_watts"] = torch.cuda.power_draw(self._device) / 1000
            logged["device/temperature_celsius"] = float(torch.cuda.temperature(self._device))
        if self.host:
            import psutil

            logged["host/cpu_percent"] = psutil.cpu_percent()
            logged["host/memory_percent"] = psutil.virtual_memory().percent
            logged["host/process_memory_gib"] = psutil.Process().memory_info().rss / 2**30
        return logged
