"""What is known of a script's call: written down by `capture`, read by the ejector."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Span(NamedTuple):
    """Where an expression stands in a file, as `ast` counts: lines from 1, columns in bytes from 0."""

    line: int
    column: int
    end_line: int
    end_column: int


@dataclass(frozen=True)
class Plugin:
    """A callback or logger that was passed."""

    name: str  # of its class
    module: str
    events: tuple[str, ...] = ()  # the events that it has
    has_state: bool = False
    averages: bool = False
    is_ours: bool = False  # whether its class is the library's
    label: str = ""  # the variable that holds it
    state_name: str = ""  # what its state is saved under


@dataclass(frozen=True)
class Other:
    """A later call of `test`, `validate` or `predict` on the same trainer."""

    call: Span
    kind: str
    numbered: bool  # whether its step takes the step's number


@dataclass(frozen=True)
class Facts:
    """A call that trains, as it was reached."""

    file: str  # the file that the call stands in
    call: Span  # the call of fit or start
    trainer_file: str
    trainer: Span  # the call that made the trainer
    kind: str  # "fit" or "start"
    settings: dict[str, Any]
    callbacks: tuple[Plugin, ...] = ()
    loggers: tuple[Plugin, ...] = ()
    none: tuple[str, ...] = ()  # arguments of the call that are None
    functions: tuple[str, ...] = ()  # of optimizer and scheduler those that are functions, not objects
    plateau: bool = False  # whether the scheduler follows the monitored metric
    numbered: tuple[str, ...] = ()  # of step and eval_step those that take the step's number
    has_hparams: bool = False
    has_buffers: bool = True  # whether the model has any, which ranks make the same before they are used
    has_extra: bool = True  # whether the state of the model has more than tensors
    skips: bool = False  # whether resume_by_skipping was set
    is_abstract: bool = False  # whether some of the model is on the meta device
    is_training: bool = False  # whether the model is in train mode
    val_names: tuple[str, ...] | None = None  # of a dict of validation loaders
    batch: str = ""  # what a batch is: a "list", "tuple" or "dict" of tensors, a "tensor"; "" for all else
    own_batches: bool = False  # whether a loop of one's own trains on other batches than the loader's
    reads: tuple[
        str, ...
    ] = ()  # of "shuffled", "workers", "persistent" and "together" what holds of a plain training loader
    plain_data: bool = False  # whether the training loader is one that the plain twin reads
    returns: str = ""  # "Mapping" where the step is seen to return one
    uses: tuple[str, ...] = field(default=())  # of "Mean" and "computed" what metrics may be
    parallel: dict[str, Any] | None = None  # how several ranks are used; None: the script is for one process
    stops: tuple[
        str, ...
    ] = ()  # of "validation_end", "step_end" and "epoch_end" those by which a callback may end the run
    stops_alone: str = ""  # the class of a callback that may end the run by what it returns from on_step_end
    refused_on_ranks: str = ""  # what of the objects that were passed has no form on several ranks
    others: tuple[Other, ...] = ()
    total_steps: int | None = None
    arguments: tuple[str, ...] = ()  # of the script
    modules: tuple[str, ...] = ()  # modules of the user's own that import the library, each with the line

    @property
    def plain_board(self) -> bool:
        """Whether TensorBoard gets numbers alone."""
        return not self.has_hparams

    def reopens(self, logger: Plugin) -> bool:
        """Whether a logger can be opened again with nothing but the folder of the run."""
        return logger.name == "TensorBoard" and logger.is_ours and self.plain_board

    def to_json(self) -> str:
        """Write the facts down."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Facts:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        for name in ("call", "trainer"):
            values[name] = Span(*values[name])
        for name in ("callbacks", "loggers"):
            values[name] = tuple(Plugin(**{**p, "events": tuple(p["events"])}) for p in values[name])
        values["others"] = tuple(
            Other(Span(*other["call"]), other["kind"], other["numbered"]) for other in values["others"]
        )
        for name in ("none", "functions", "numbered", "reads", "stops", "uses", "arguments", "modules"):
            values[name] = tuple(values[name])
        if values["val_names"] is not None:
            values["val_names"] = tuple(values["val_names"])
        return cls(**values)
