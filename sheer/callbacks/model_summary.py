"""A table of a model's parts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from sheer.distributed.agree import gathered, is_other_rank
from sheer.errors import SettingsError
from sheer.events import RunInfo


class ModelSummary:
    """Prints a table of the model's modules at the start: parameters, how many of them are trained, bytes with buffers.

    Args:
        depth: how deep modules in modules are listed; 0: the model alone.

    Raises:
        SettingsError: `depth` is below 0.
    """

    def __init__(self, depth: int = 1) -> None:
        if depth < 0:
            raise SettingsError(f"ModelSummary(depth={depth!r}): the depth is 0 (the model alone) or more.")
        self.depth = depth

    def on_fit_start(self, model: nn.Module, optimizers: Mapping[str, Optimizer], info: RunInfo) -> None:
        """Print the table."""
        table = model_table(model, self.depth)
        if info.ranks is not None and info.ranks.parallel.pp > 1:  # where each rank has some of the layers
            tables = gathered(table if info.ranks.leads else "")
            table = "\n\n".join(f"on rank {rank}:\n{part}" for rank, part in enumerate(tables) if part)
        if not is_other_rank(info.ranks):
            print(table, flush=True)


def model_table(model: nn.Module, depth: int) -> str:
    """Return the table of a model's modules. What is shared counts once in each line."""
    rows: list[tuple[str, ...]] = [("module", "type", "parameters", "trained", "MB")]
    for name, module in model.named_modules():
        level = name.count(".") + 1 if name else 0
        if level <= depth:
            parameters, buffers = list(module.parameters()), list(module.buffers())
            held = sum(tensor.numel() * tensor.element_size() for tensor in [*parameters, *buffers])
            counts = (sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))
            indent = "  " * (level - 1)
            rows.append(
                (indent + (name or "(all)"), type(module).__name__, *(f"{n:,}" for n in counts), f"{held / 1e6:,.2f}")
            )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
