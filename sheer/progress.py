"""How far a run has come, and what it measured last: what is saved and restored."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(slots=True)
class Progress:
    """Where a run stands. A step counts once it has begun; all others count what is done."""

    step: int = 0  # steps, from the start of the run
    epoch: int = 0  # whole epochs
    batch: int = 0  # batches of the loader in the epoch that is running
    samples: int = 0  # samples trained on
    skipped: int = 0  # steps whose update was left out, for a NaN or infinity in them
    skipped_in_a_row: int = 0  # how many of them came one after the other, up to the last
    last_skipped: int = 0  # the last of them
    seconds: float = 0.0  # time spent between the start and the last save, earlier sessions counted in
    stopped_by: str | None = None  # why the run ended; None: it has not
    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation, or log point
    validated_at: int = -1  # the step of that validation
    saved_at: int = -1  # the step whose checkpoint holds all of the run as it is now; -1: something came since
    micro_batch_size: int | None = None  # what they were halved to where memory ran out; None: it never did
    owes_validation: bool = False  # whether the run was stopped in a validation, which is to be run when it goes on
    scale: float = 1.0  # the factor of a gradient scaler after the last step
    rollbacks: int = 0  # how often the run went back to a checkpoint
    left_out: list[list[int]] = field(default_factory=list)  # [epoch, first, last] of batches passed over
    losses: list[float] = field(default_factory=list)  # of the last good steps, where spikes are looked for

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `asdict` returned."""
        for own in fields(self):
            setattr(self, own.name, state.get(own.name, getattr(self, own.name)))
