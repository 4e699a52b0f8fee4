"""What a logger is, and the one place that calls all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from sheer.errors import SheerWarning
from sheer.events import RunInfo, named
from sheer.metrics import Media


@runtime_checkable
class Logger(Protocol):
    """Takes what a run reports. Nothing is inherited: any object with these methods will do.

    It may also have `log_media(step, media)` for pictures, texts and figures, a `client` (the library's own object), and
    `state_dict` and `load_state_dict` for what it needs to go on where a run stopped.
    """

    def start(self, info: RunInfo) -> None:
        """Open what is needed; called once, after `load_state_dict`."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a log point or of a validation, and "epoch"."""

    def close(self) -> None:
        """Write out what is left; called once, at the end, also after an error."""


class Loggers:
    """All loggers of a run. One that fails is warned of once and goes on being tried: no logger stops a training."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = tuple(loggers)
        self._warned: set[str] = set()

    def with_state(self) -> dict[str, Any]:
        """Return the loggers that have state, by name."""
        return named(self.loggers)

    def start(self, info: RunInfo) -> None:
        """Open all."""
        for logger in self.loggers:
            self._guarded(logger, "start", logger.start, info)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the metrics to all."""
        for logger in self.loggers:
            self._guarded(logger, "log", logger.log, step, metrics)

    def log_media(self, step: int, media: Mapping[str, Media]) -> None:
        """Hand pictures, texts and figures to those that can show them; the others say once that they cannot."""
        for logger in self.loggers:
            if hasattr(logger, "log_media"):
                self._guarded(logger, "log_media", logger.log_media, step, media)

    def close(self) -> None:
        """Close all."""
        for logger in self.loggers:
            self._guarded(logger, "close", logger.close)

    def _guarded(self, logger: Logger, what: str, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            name = f"{type(logger).__name__}.{what}"
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"{name} failed, and training goes on: {type(error).__name__}: {error}. It will be tried again, without a word.",
                    SheerWarning,
                    stacklevel=2,
                )
