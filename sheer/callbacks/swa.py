"""Stochastic weight averaging: the mean of the weights along the end of a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import get_swa_multi_avg_fn, update_bn

from sheer.averaging import AveragedWeights, copy_into
from sheer.build import TRUE_DTYPES
from sheer.data.batch import move
from sheer.errors import SettingsError, SheerWarning, user_level
from sheer.events import RunInfo
from sheer.random import random_state, seed_everything, set_random_state
from sheer.schedules import set_rate


class SWA:
    """Keeps the mean of the weights of several steps (Izmailov et al. 2018), which evaluation and the model in checkpoints use.

    The first average is a copy of the weights, each later one counts as much as all others, by torch.optim.swa_utils. The trained
    weights are in the model at all other times; to go on with the averages: `model.load_state_dict(swa.averages(), strict=False)`.

    The running statistics of batch norms belong to the trained weights, not to their mean. They are computed anew by torch's
    `update_bn`, in one pass over `bn_loader` with the averages in the model, once for each new average that is evaluated or saved.
    That pass has random numbers of its own (seed 0), so that the run and its resumption are the same with and without it.

    Args:
        start_step: steps that pass before the averaging begins; or give `start_epoch`.
        start_epoch: epochs that pass before the averaging begins.
        every_n_steps: steps from one averaging to the next; None: an epoch.
        lr: the learning rate of all groups once the averaging has begun, whatever the scheduler says; None: the scheduler's.
        anneal_steps: steps over which the learning rate moves to `lr`, along a cosine: lr_0 + (lr - lr_0) (1 - cos(pi t)) / 2.
        bn_loader: batches for the statistics of batch norms; a loader of its own, not the one that trains, if it shuffles or samples
            with a generator of its own. False: leave the statistics of the trained weights.
        bn_forward: what to call as (model, batch); None: the model, with the batch or the first element of it.

    Raises:
        SettingsError: the start is missing or said twice; at the start where the length of an epoch is needed and not known, or where
            the model has batch norms and `bn_loader` is not given.
    """

    def __init__(
        self,
        *,
        start_step: int | None = None,
        start_epoch: int | None = None,
        every_n_steps: int | None = None,
        lr: float | None = None,
        anneal_steps: int = 0,
        bn_loader: Iterable[Any] | Literal[False] | None = None,
        bn_forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        if (start_step is None) == (start_epoch is None):
            raise SettingsError(
                "SWA needs one of start_step and start_epoch: what passes before the averaging begins, often three quarters of the run."
            )
        self.start_step, self.start_epoch, self.every_n_steps = start_step, start_epoch, every_n_steps
        self.lr, self.anneal_steps, self.bn_loader, self.bn_forward = lr, anneal_steps, bn_loader, bn_forward
        self._combine = get_swa_multi_avg_fn()
        self._weights = AveragedWeights()
        self._groups: list[dict[str, Any]] = []
        self._norms: dict[str, _BatchNorm] = {}
        self._start, self._every = 0, 1
        self._dtype: torch.dtype | None = None  # what batches are converted to, where the model was
        self._due = self._stale = False
        self._loaded: dict[str, Tensor] | None = None
        self._restored: dict[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self._count = 0
        self._initial_lrs: list[float] = []
        self._statistics: dict[str, Tensor] = {}
        self._held: list[Tensor] = []

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        """Find the parameters that the optimizers hold, and the batch norms."""
        self._start, self._every = self._schedule(info.steps_per_epoch)
        last = info.total_steps
        if last is not None and self._start + self._every > last and not info.settings["fast_dev_run"]:
            warnings.warn(
                f"SWA will average nothing: its first average is that of step {self._start + self._every:,}, and the run ends at step {last:,}.",
                SheerWarning,
                stacklevel=user_level(),
            )
        self._groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
        self._weights.bind(model, optimizers)
        self._forget()
        self._find_norms(model)
        if self._norms and info.ranks is not None and not info.ranks.uses_ddp:
            raise SettingsError(
                "SWA computes the statistics of batch norms by running the model outside of a step, and a model that is divided over ranks runs "
                'only in one. Set bn_loader=False, or parallel="ddp".'
            )
        self._dtype = TRUE_DTYPES.get(info.settings["precision"])
        if self._restored is not None:
            self._count, self._initial_lrs = self._restored["count"], self._restored["initial_lrs"]
        self._restored = None

    def _schedule(self, steps_per_epoch: int | None) -> tuple[int, int]:
        """Return the steps before the averaging and between two of it."""
        if steps_per_epoch is None and (self.start_step is None or self.every_n_steps is None):
            raise SettingsError(
                "SWA counts in epochs, and the steps of an epoch are not known. Give start_step and every_n_steps."
            )
        epoch = steps_per_epoch or 0
        before = self.start_step if self.start_step is not None else (self.start_epoch or 0) * epoch
        return before, self.every_n_steps or epoch

    def _find_norms(self, model: nn.Module) -> None:
        self._model, self._stale = model, False
        norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
        if norms and self.bn_loader is None:
            raise SettingsError(
                f"SWA averages weights, but the running statistics of {len(norms)} batch norms ({next(iter(norms))}, ...) belong to the weights "
                "they were computed with. Give bn_loader=<a loader of training batches> to compute them anew, or bn_loader=False to leave them."
            )
        self._norms = {} if self.bn_loader is False else norms
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._statistics = {name: loaded[name].to(buffer.device) for name, buffer in self._buffers().items()}

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        """Set the learning rate of this step, whatever a scheduler set at the end of the last."""
        self._set_lr(step)

    def on_update(self, step: int, model: nn.Module) -> None:
        """Note that the weights have changed: with several optimizers this comes several times a step."""
        self._due = step > self._start and (step - self._start) % self._every == 0
        self._set_lr(step + 1)  # for what is logged and saved: the rate of the next step

    def _set_lr(self, step: int) -> None:
        if self.lr is None or step <= self._start:
            return
        if not self._initial_lrs:
            self._initial_lrs = [float(group["lr"]) for group in self._groups]
        part = min(1.0, (step - self._start) / self.anneal_steps) if self.anneal_steps else 1.0
        weight = (1 - math.cos(math.pi * part)) / 2
        for group, initial in zip(self._groups, self._initial_lrs, strict=True):
            set_rate(group, initial + (self.lr - initial) * weight if part < 1.0 else self.lr)

    def on_step_end(self, step: int, model: nn.Module) -> None:
        """Average the weights, all optimizers having changed them."""
        self._average_if_due()

    def _average_if_due(self) -> None:
        if self._due:
            self._due, self._stale = False, True
            self._weights.average(self._combine, self._count)
            self._count += 1

    def on_evaluation_start(self, model: nn.Module) -> None:
        """Put the averages into the model, and the statistics that belong to them."""
        self._average_if_due()
        if self._weights.swap_in(model):
            if self._loaded is not None:  # a finished run was restored, and is evaluated
                self._find_norms(model)
            self._hold_statistics()

    def _hold_statistics(self) -> None:
        buffers = self._buffers()
        self._held = [buffer.clone() for buffer in buffers.values()]
        if self._stale and buffers:
            self._compute_statistics()
        self._stale = False
        copy_into(list(buffers.values()), list(self._statistics.values()))

    def on_evaluation_end(self, model: nn.Module) -> None:
        """Put the trained weights and their statistics back."""
        if self._weights.swap_out(model):
            copy_into(list(self._buffers().values()), self._held)

    def averages(self) -> dict[str, Tensor] | None:
        """Return the averages, with the statistics that belong to them, by the model's names; None before the first."""
        if self._stale:
            self.on_evaluation_start(self._model)
            self.on_evaluation_end(self._model)
        averages = self._weights.by_name()
        return None if averages is None else {**averages, **self._statistics}

    def load_averages(self, weights: Mapping[str, Tensor]) -> None:
        """Take the averages that a checkpoint holds."""
        self._weights.load(weights)
        self._loaded = dict(weights)

    def state_dict(self) -> dict[str, Any]:
        """Return how many weights were averaged, and the learning rates from before."""
        return {"count": self._count, "initial_lrs": self._initial_lrs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._restored = state

    def _buffers(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": buffer for name, m in self._norms.items() for key, buffer in m.named_buffers()}

    def _compute_statistics(self) -> None:
        """Compute the statistics with the weights that are in the model."""
        states, modes = random_state(), [(module, module.training) for module in self._model.modules()]
        seed_everything(0)
        update_bn(self._inputs(), _Forward(self._model, self.bn_forward))
        set_random_state(states)
        for module, training in modes:
            module.training = training
        self._statistics = {name: buffer.clone() for name, buffer in self._buffers().items()}

    def _inputs(self) -> Iterator[list[Any]]:
        device = next(self._model.parameters()).device
        for batch in self.bn_loader or ():
            yield [move(batch, device, self._dtype)]


class _Forward(nn.Module):
    """The model as `update_bn` calls it."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any] | None) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Any) -> Any:
        if self.function is not None:
            return self.function(self.model, batch)
        return self.model(batch[0] if isinstance(batch, (list, tuple)) else batch)
