"""How fast a run trains: samples, tokens and steps a second, and the share of the device's peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sheer.distributed.agree import over_data_ranks
from sheer.distributed.mesh import Ranks
from sheer.errors import SettingsError
from sheer.events import RunInfo

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

# Dense bfloat16 peaks in FLOP/s, from the vendors' data sheets (half of the figures they give "with sparsity").
# Of the names in the device's name the longest counts.
PEAK_FLOPS = {
    "A10": 125e12,
    "A10G": 70e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX A6000": 154.8e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
    "H20": 148e12,
    "H100": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "MI250X": 383e12,
    "MI300X": 1307.4e12,
    "MI325X": 1307.4e12,
}


class Throughput:
    """Logs the speed since the last log point; the time of validations and saves is left out.

    It is `throughput/samples_per_second` and `throughput/steps_per_second`; with `tokens` also `throughput/tokens_per_second`; with
    `flops_per_sample` also `throughput/mfu`, model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B): FLOPs that the model
    needs, over the time times the peak. The host waits for the device nowhere but where the log point already does.

    Args:
        tokens: of a sample (a number), or of a batch: the key of a tensor in it, whose elements are counted, or a function of the
            batch that returns a number or a scalar tensor, which is read at the log point only.
        flops_per_sample: forward and backward; "count" counts the first step's by torch's FlopCounterMode (what is recomputed by
            activation checkpointing is counted too, and causal attention in full).
        peak_flops: of the device, in FLOP/s; None: the dense bfloat16 peak of well-known GPUs.

    Raises:
        SettingsError: at the start where the peak is not known, or a compiled model's FLOPs are to be counted.
    """

    def __init__(
        self,
        *,
        tokens: int | str | Callable[[Any], int | Tensor] | None = None,
        flops_per_sample: float | Literal["count"] | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self.tokens, self.flops_per_sample, self.peak_flops = tokens, flops_per_sample, peak_flops
        self._flops: float | None = None if flops_per_sample == "count" else flops_per_sample
        self._counter: FlopCounterMode | None = None
        self._peak = peak_flops or 0.0
        self._samples, self._tried, self._step = 0, 0, 0
        self._ranks: Ranks | None = None
        self._counts: list[int | Tensor] = []
        self._since: float | None = None
        self._left_out = self._paused = self._step_ended = 0.0

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        """Find out the peak."""
        self._step, self._since, self._ranks = info.start_step, None, info.ranks
        if self.flops_per_sample is not None and self.peak_flops is None:
            self._peak = known_peak(info.device)
        if info.ranks is not None:
            self._peak *= info.ranks.world_size
            if self.flops_per_sample == "count" and info.ranks.averaged < info.ranks.world_size:
                raise SettingsError(
                    'Throughput(flops_per_sample="count") sees what one rank computes, and tp and pp divide a sample over several. Give the number.'
                )
        if self._flops is None and self.flops_per_sample == "count" and info.settings["compile"]:
            raise SettingsError(
                'Throughput(flops_per_sample="count") cannot see into a compiled model. Give the number: run once without compile, or '
                "take 6 x parameters x tokens of a sample for a transformer."
            )

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        """Count what the step trains on."""
        if self._since is None:
            self._since, self._samples, self._left_out = time.perf_counter(), 0, 0.0
            self._counts.clear()
        for part, samples in batch or ():
            self._samples += samples
            if self.tokens is not None and samples > 0:  # else it is run for the other ranks' sake
                self._counts.append(tokens_of(self.tokens, part, samples))
        self._tried = sum([samples for _, samples in batch or ()])
        if self.flops_per_sample == "count" and self._flops is None and self._tried > 0:
            self._start_counting()

    def on_evaluation_start(self, model: nn.Module) -> None:
        """Stop the clock."""
        self._stop_counting()
        self._paused = time.perf_counter()

    def on_evaluation_end(self, model: nn.Module) -> None:
        """Let the clock go on."""
        self._left_out += time.perf_counter() - self._paused

    def on_log(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        """Return the speed since the last log point."""
        self._stop_counting()
        now = time.perf_counter()
        taken = step - self._step
        if self._since is None or taken == 0:
            return None
        passed = now - self._since - self._left_out
        logged = {"steps_per_second": taken / passed}
        samples = over_data_ranks(self._ranks, self._samples)
        if samples:
            logged["samples_per_second"] = samples / passed
        tokens = over_data_ranks(self._ranks, float(sum(self._counts))) if self.tokens is not None else 0.0
        if tokens:
            logged["tokens_per_second"] = tokens / passed
        if self._flops is not None and samples:
            logged["mfu"] = self._flops * samples / passed / self._peak
        self._since, self._step, self._samples, self._left_out = now, step, 0, 0.0
        self._counts.clear()
        return {f"throughput/{name}": value for name, value in logged.items()}

    def on_step_end(self, step: int, model: nn.Module) -> None:
        """Note when a save may begin."""
        self._stop_counting()
        self._step_ended = time.perf_counter()

    def on_save(self, step: int, path: Path) -> None:
        """Leave the save out."""
        self._left_out += time.perf_counter() - self._step_ended

    def on_exception(self, error: BaseException) -> None:
        """Leave no mode of torch behind."""
        self._stop_counting()

    def state_dict(self) -> dict[str, Any]:
        """Return the FLOPs that were counted."""
        return {"flops_per_sample": self._flops}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        if self.flops_per_sample == "count":
            self._flops = state["flops_per_sample"]

    def _start_counting(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        self._counter = FlopCounterMode(display=False)
        self._counter.__enter__()

    def _stop_counting(self) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._flops = self._counter.get_total_flops() / self._tried
            self._counter = None


def tokens_of(tokens: int | str | Callable[[Any], int | Tensor], batch: Any, samples: int) -> int | Tensor:
    """Count the tokens of a batch, as `Throughput` is told to."""
    if isinstance(tokens, int):
        return tokens * samples
    if isinstance(tokens, str):
        return int(batch[tokens].numel())
    counted_tokens = tokens(batch)
    return counted_tokens.detach() if isinstance(counted_tokens, Tensor) else counted_tokens


def known_peak(device: torch.device) -> float:
    """Return the dense bfloat16 peak of a device, in FLOP/s.

    Raises:
        SettingsError: it is not known.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return peak_by_name(name)


def peak_by_name(device_name: str) -> float:
    """Return the dense bfloat16 peak of the device of that name, in FLOP/s.

    Raises:
        SettingsError: it is not known.
    """
    words = f" {device_name.replace('-', ' ')} "
    matches = [name for name in PEAK_FLOPS if f" {name} " in words]
    if not matches:
        raise SettingsError(
            f"Throughput does not know the peak of {device_name!r}, and the utilisation is relative to it. Give peak_flops, in FLOP/s, from its data sheet."
        )
    return PEAK_FLOPS[max(matches, key=len)]
