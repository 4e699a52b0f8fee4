"""Weights & Biases."""

from __future__ import annotations

import html
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sheer.errors import MissingPackageError
from sheer.events import RunInfo
from sheer.loggers.values import drawn, pixels
from sheer.metrics import Image, Media, Text
from sheer.rundir import plain


class WandB:
    """Logs to a run of Weights & Biases, whose files are in `wandb/` in the run's folder. A resumed run goes on as the same W&B run.

    The x-axis of all charts is `step`. Hyper-parameters are its config, the settings are there under `sheer`. All arguments are
    those of `wandb.init`; one that is None is left to W&B, and so to its environment variables.

    Args:
        project: the project the run belongs to.
        name: the name shown for the run.
        entity: the user or team.
        group: the group of runs.
        job_type: the kind of run within its group.
        tags: labels.
        notes: a longer description.
        mode: "online", "offline" (upload later with `wandb sync`), or "disabled".
        run_id: an existing run to go on with; None: the one in the checkpoint, or a new one.

    Raises:
        MissingPackageError: wandb is not installed.
    """

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        *,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        run_id: str | None = None,
    ) -> None:
        try:
            from wandb import init  # noqa: F401 # a folder wandb/ can be imported too, but has no init
        except ImportError as error:
            raise MissingPackageError('sheer.WandB needs wandb. Install it: pip install "sheer[wandb]"') from error
        self.project, self.name, self.entity = project, name, entity
        self.group, self.job_type, self.tags, self.notes = group, job_type, tuple(tags), notes
        self.mode = mode
        self.run_id = run_id
        self._given_id = run_id
        self._run: str | None = None
        self._client: Any = None

    @property
    def client(self) -> Any:
        """The `wandb.Run`, which has `url`, `log_artifact` and all else; None before the run starts."""
        return self._client

    def start(self, info: RunInfo) -> None:
        """Open a W&B run, or go on with the one there was."""
        import wandb

        if info.run_id != self._run:
            self._run, self.run_id = info.run_id, self._given_id
        self._client = wandb.init(
            project=self.project,
            name=self.name,
            entity=self.entity,
            group=self.group,
            job_type=self.job_type,
            tags=self.tags or None,
            notes=self.notes,
            mode=self.mode,
            dir=str(info.run_dir.absolute()),  # its service is a process of its own, which may be in another folder
            id=self.run_id,
            resume="allow",
            reinit="create_new",  # several loggers, and what the script itself has open, do not disturb each other
            config={"sheer": plain(info.settings), **plain(info.hparams)},
            allow_val_change=True,  # durations may be others when a run goes on
        )
        self.run_id = self._client.id
        # W&B's own step must grow with every row, and a run that goes on from a checkpoint goes back.
        self._client.define_metric("step")
        self._client.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a row."""
        self._client.log({"step": step, **metrics})

    def log_media(self, step: int, media: Mapping[str, Media]) -> None:
        """Add images and texts; a figure becomes an image."""
        import wandb

        row: dict[str, Any] = {"step": step}
        for name, item in media.items():
            if isinstance(item, Image):
                row[name] = wandb.Image(pixels(item))
            elif isinstance(item, Text):
                row[name] = wandb.Html(f"<pre>{html.escape(item.text)}</pre>")
            else:
                row[name] = wandb.Image(drawn(item))
        self._client.log(row)

    def close(self) -> None:
        """Send what is left, and mark the run as finished, or as failed where an error ends it."""
        if self._client is not None:
            self._client.finish(exit_code=0 if sys.exception() is None else 1)

    def state_dict(self) -> dict[str, Any]:
        """Return which run it is, and its W&B id."""
        return {"run": self._run, "run_id": self.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the same W&B run."""
        self._run, self.run_id = state["run"], self._given_id or state["run_id"]
