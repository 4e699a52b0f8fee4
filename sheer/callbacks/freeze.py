"""Keep parts of a model as they are, for the whole run or for its first steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from sheer.errors import ModelError, SettingsError
from sheer.events import RunInfo


class Freeze:
    """Freezes parameters by their names, and lets them train after a number of steps or epochs.

    The optimizer holds the parameters from the beginning, as it holds all others; while they are frozen they have no gradient, and
    it leaves them alone, weight decay included. After the run all can be trained, as before it. Several of these callbacks unfreeze a model part by part.

    Args:
        patterns: names of modules or parameters, with the wildcards of `fnmatch`: "encoder", "layers.[0-3]", "*.bias". A module's
            name stands for all that is in it.
        until_step: train them after this many steps; None: not by steps.
        until_epoch: train them after this many epochs; None: not by epochs. Neither: they are frozen for the whole run.
        batch_norm_eval: also keep the running statistics of batch norms that are frozen, by putting them into eval mode.

    Raises:
        SettingsError: both durations are given.
        ModelError: at the start where a pattern fits nothing, or the optimizer does not hold what is to be trained later.
    """

    def __init__(
        self,
        patterns: str | Sequence[str],
        *,
        until_step: int | None = None,
        until_epoch: int | None = None,
        batch_norm_eval: bool = True,
    ) -> None:
        if until_step is not None and until_epoch is not None:
            raise SettingsError(f"Freeze(until_step={until_step}, until_epoch={until_epoch}): give one of the two.")
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        self.until_step, self.until_epoch, self.batch_norm_eval = until_step, until_epoch, batch_norm_eval
        self._parameters: list[nn.Parameter] = []
        self._norms: list[nn.Module] = []
        self._frozen = False
        self._thawed_before = False  # the run that goes on had unfrozen them

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        """Freeze, unless the run that goes on had unfrozen."""
        if info.ranks is not None and (self.until_step is not None or self.until_epoch is not None):
            raise SettingsError(
                "Freeze with until_step or until_epoch changes which parameters are trained during the run, and ranks agree on that at its start. "
                "Train in two runs, the second from the weights of the first, or freeze for the whole run."
            )
        self._freeze(False)  # where the run goes back, and was begun already
        names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_modules()}
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ModelError(
                    f"Freeze({pattern!r}) fits no module and no parameter of the model. Its parts are: {', '.join(name for name, _ in model.named_children())}."
                )
        chosen = {name: p for name, p in model.named_parameters() if p.requires_grad and self._fits(name)}
        if self.until_step is not None or self.until_epoch is not None:
            held = {id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]}
            lacking = [name for name, p in chosen.items() if id(p) not in held]
            if lacking:
                raise ModelError(
                    f"Freeze is to train {', '.join(lacking[:5])} later, but no optimizer holds them. Build the optimizer with all parameters."
                )
        norms = [
            module for name, module in model.named_modules() if isinstance(module, _BatchNorm) and self._fits(name)
        ]
        self._parameters = list(chosen.values())
        self._norms = [norm for norm in norms if norm.training] if self.batch_norm_eval else []
        thawed, self._thawed_before = self._thawed_before, False
        self._frozen = False
        if not thawed:
            self._freeze(True)

    def on_epoch_start(self, epoch: int, model: nn.Module) -> None:
        """Unfreeze before the epoch after `until_epoch`."""
        if self._frozen and self.until_epoch is not None and epoch >= self.until_epoch:
            self._freeze(False)

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        """Unfreeze before the step after `until_step`."""
        if self._frozen and self.until_step is not None and step > self.until_step:
            self._freeze(False)

    def on_fit_end(self, step: int, model: nn.Module) -> None:
        """Leave the model as it was found."""
        self._freeze(False)

    def state_dict(self) -> dict[str, Any]:
        """Return whether the parameters are frozen."""
        return {"frozen": self._frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._thawed_before = not state["frozen"]

    def _fits(self, name: str) -> bool:
        """Whether a pattern fits a name, or that of a module around it."""
        parts = name.split(".")
        around = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        return any(fnmatchcase(outer, pattern) for outer in around for pattern in self.patterns)

    def _freeze(self, frozen: bool) -> None:
        self._frozen = frozen
        for parameter in self._parameters:
            parameter.requires_grad_(not frozen)
        for norm in self._norms:
            norm.train(not frozen)
