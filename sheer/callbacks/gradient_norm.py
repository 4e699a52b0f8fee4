"""Log the norm of the gradients."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from sheer.distributed.gradients import global_norm
from sheer.distributed.mesh import Ranks
from sheer.errors import SettingsError
from sheer.events import RunInfo


class GradientNorm:
    """Logs the norm of all gradients before clipping, as `train/gradient_norm`, of the very steps that are log points.

    At other steps it does nothing. It is of all parameters that have a gradient at the update; where a step has several updates
    (several optimizers) they are numbered in their order: `train/gradient_norm/1`. An end of the run that falls between two log
    points has no value.

    Args:
        per_parameter: also log the norm of each parameter's gradient, as `train/gradient_norm/<name>`.
        norm_type: 2.0 for the Euclidean norm, or another p; `inf` for the largest absolute value.
    """

    def __init__(self, *, per_parameter: bool = False, norm_type: float = 2.0) -> None:
        self.per_parameter, self.norm_type = per_parameter, norm_type
        self._every = 1
        self._ranks: Ranks | None = None
        self._step = -1
        self._updates: list[dict[str, Tensor]] = []

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        """Learn which steps are log points."""
        self._every, self._ranks = info.log_every_n_steps, info.ranks
        if self.per_parameter and info.ranks is not None and info.ranks.parallel.pp > 1:
            raise SettingsError(
                "GradientNorm(per_parameter=True) needs all parameters on a rank, and pp divides them. Leave per_parameter out."
            )

    def on_gradients(self, step: int, model: nn.Module) -> None:
        """Compute the norms, on the device."""
        if step % self._every != 0:
            return
        if step != self._step:
            self._step, self._updates = step, []
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norms = {"": global_norm(gradients.values(), self._ranks, self.norm_type)}
        if self.per_parameter:
            norms |= {
                f"/{name}": global_norm([gradient], self._ranks, self.norm_type) for name, gradient in gradients.items()
            }
        self._updates.append(norms)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        """Read the norms of this step."""
        if step != self._step:
            return None
        logged: dict[str, float] = {}
        for index, norms in enumerate(self._updates):
            place = f"/{index + 1}" if len(self._updates) > 1 else ""
            logged |= {f"train/gradient_norm{place}{name}": norm.item() for name, norm in norms.items()}
        return logged
