"""TensorBoard's event files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sheer.events import RunInfo
from sheer.loggers.values import flattened, pixels
from sheer.metrics import Image, Media, Text
from sheer.rundir import plain

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes TensorBoard's event files to a folder in the run's folder: look at them with `tensorboard --logdir runs`.

    Hyper-parameters are in its HParams page, with the monitored metric; the settings are a text. When a stopped run goes on,
    TensorBoard hides what was written after the checkpoint.

    Args:
        folder: the folder's name.
    """

    def __init__(self, folder: str = "tensorboard") -> None:
        self.folder = folder
        self._run: str | None = None
        self._goes_on = False  # opened before in this process: nothing in the files is to be hidden
        self._writer: SummaryWriter | None = None

    @property
    def client(self) -> SummaryWriter | None:
        """PyTorch's `SummaryWriter`; None before the run starts."""
        return self._writer

    def start(self, info: RunInfo) -> None:
        """Open a new event file; what others in the folder hold of steps that will be made again is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        hide_from = None if self._goes_on and info.run_id == self._run else info.start_step + 1
        self._writer = SummaryWriter(str(info.run_dir / self.folder), purge_step=hide_from, flush_secs=10)
        if hide_from is not None:
            self._write_hparams(self._writer, info)
        self._run, self._goes_on = info.run_id, True

    def _write_hparams(self, writer: SummaryWriter, info: RunInfo) -> None:
        from torch.utils.tensorboard.summary import hparams

        # SummaryWriter.add_hparams would put them into a run of their own, beside this one.
        monitored: dict[str, float] = {info.monitor: 0.0} if info.monitor is not None else {}
        files: Any = writer.file_writer
        for summary in hparams(flattened(info.hparams), monitored):
            files.add_summary(summary)
        writer.add_text("settings", f"```json\n{json.dumps(plain(info.settings), indent=1)}\n```", info.start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a scalar for each metric."""
        assert self._writer is not None
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_media(self, step: int, media: Mapping[str, Media]) -> None:
        """Add images and texts; a figure becomes an image."""
        assert self._writer is not None
        for name, item in media.items():
            if isinstance(item, Image):
                self._writer.add_image(name, pixels(item), step, dataformats="HWC")
            elif isinstance(item, Text):
                self._writer.add_text(name, item.text, step)
            else:
                self._writer.add_figure(name, item.figure, step, close=False)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()

    def state_dict(self) -> dict[str, Any]:
        """Write what is left, since a run that goes on from here will not write it again; return which run it is."""
        if self._writer is not None:
            self._writer.flush()
        return {"run": self._run}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hide, at the start, what was written after the checkpoint."""
        self._run, self._goes_on = state["run"], False
