"""What a logger is, and the one place that calls all of them."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sheer.console import Console
from sheer.errors import SettingsError, SheerWarning, user_level
from sheer.events import RunInfo, named
from sheer.metrics import Figure, Image, Media, Text


@runtime_checkable
class Logger(Protocol):
    """Takes what a run reports. Nothing is inherited: any object with these methods will do.

    It may also have `log_media(step, media)` for pictures, texts and figures, a `client` (the library's own object), and
    `state_dict` and `load_state_dict` for what it needs to go on where a run stopped.
    """

    def start(self, info: RunInfo) -> None:
        """Open what is needed; called after `load_state_dict`, and again after `close` where more of the same run comes."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a log point or of a validation, and "epoch"."""

    def close(self) -> None:
        """Write out what is left; called at the end, also after an error."""


@runtime_checkable
class KeepsLines(Protocol):
    """Writes lines to a file in the run's folder, and knows whether those that a checkpoint has counted are gone."""

    def lost(self, info: RunInfo) -> Path | None:
        """Return the path of the file where all of them are; called before `start`."""


def check_loggers(loggers: Sequence[Logger | Console]) -> None:
    """Raise `SettingsError` for what cannot be told anything."""
    if not isinstance(loggers, Sequence):  # a generator would be empty at the second look
        raise SettingsError(f"loggers must be a list, not a {type(loggers).__name__}: loggers=[...].")
    for logger in loggers:
        if isinstance(logger, type):
            raise SettingsError(f"loggers holds the class {logger.__name__}; give an object: {logger.__name__}().")
        lacking = [name for name in ("start", "log", "close") if not callable(getattr(logger, name, None))]
        if lacking and not isinstance(logger, Console):
            raise SettingsError(
                f"A logger has the methods start(info), log(step, metrics) and close(); {type(logger).__name__} lacks {', '.join(lacking)}."
            )


class Loggers:
    """All loggers of a run. One that fails is warned of, once for each of its methods: no logger stops a training."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.members = tuple(loggers)
        self._started: tuple[Logger, ...] = ()
        self._states: dict[str, dict[str, Any]] = {}
        self._warned: set[tuple[int, str]] = set()
        self._unshown: set[type] = set()

    @property
    def are_open(self) -> bool:
        """Whether they were started and not closed yet."""
        return bool(self._started)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the states of the loggers that have one, by name; where one fails now, the last that it gave."""
        for name, logger in named(self.members).items():
            take = functools.partial(self._take_state, name, logger)
            self._guarded(logger, "state_dict", take, "Checkpoints are saved with the last state it gave, if any.")
        return dict(self._states)

    def _take_state(self, name: str, logger: Any) -> None:
        self._states[name] = logger.state_dict()

    def paths(self) -> list[Path]:
        """Return the files that loggers write to by themselves, and whose lengths are in their states."""
        clients = [getattr(logger, "client", None) for logger in self._started]
        return [client for client in clients if isinstance(client, Path) and client.is_file()]

    def load_state_dict(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Give the loggers back the states that `state_dict` returned; what is new has none."""
        for name, logger in named(self.members).items():
            if name in states:
                self._states[name] = states[name]
                load = functools.partial(logger.load_state_dict, states[name])
                self._guarded(logger, "load_state_dict", load, "It may log anew what it logged before.")

    def warn_of_lost(self, info: RunInfo) -> None:
        """Warn of files that are gone from a folder that the run was in before; called before `start`."""
        for path in [logger.lost(info) for logger in self.members if isinstance(logger, KeepsLines)]:
            if path is not None:
                warnings.warn(
                    f"{path} is gone, and with it all lines up to step {info.start_step:,}, which the checkpoint of that step has counted. The run goes on, "
                    "and writes those that follow: what it trains does not depend on them.",
                    SheerWarning,
                    stacklevel=user_level(),
                )

    def start(self, info: RunInfo) -> None:
        """Open all. One that fails here is left alone until the next start: to try at each log point could take minutes."""
        self._started = tuple(
            logger
            for logger in self.members
            if self._guarded(logger, "start", functools.partial(logger.start, info), "It gets nothing from this run.")
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the metrics to all."""
        for logger in self._started:
            call = functools.partial(logger.log, step, metrics)
            self._guarded(logger, "log", call, "It is tried again at each log point, without a word.")

    def log_media(self, step: int, media: Mapping[str, Media]) -> None:
        """Hand pictures, texts and figures to the loggers that show them; where none does, say so once a kind.

        The figures are closed afterwards: pyplot would keep them all.
        """
        if not media:
            return
        showing = [(logger, logger.log_media) for logger in self._started if hasattr(logger, "log_media")]
        for logger, show in showing:
            call = functools.partial(show, step, media)
            self._guarded(logger, "log_media", call, "It is tried again with the next, without a word.")
        if not showing:
            self._say_unshown(media)
        close_figures(media)

    def close(self) -> None:
        """Close all, also those that could not be started: they may hold half of what they need."""
        for logger in self.members:
            if logger in self._started:
                self._guarded(logger, "close", logger.close, "The last of what it was given may be missing.")
            else:
                with contextlib.suppress(Exception):
                    logger.close()
        self._started = ()

    def _guarded(self, logger: object, what: str, call: Callable[[], None], consequence: str) -> bool:
        """Call, and return whether it went well; warn at the first time that it does not."""
        try:
            call()
        except Exception as error:
            if (id(logger), what) not in self._warned:
                self._warned.add((id(logger), what))
                warnings.warn(
                    f"{type(logger).__name__}.{what} failed, and training goes on: {type(error).__name__}: {error}. {consequence}",
                    SheerWarning,
                    stacklevel=user_level(),
                )
            return False
        return True

    def _say_unshown(self, media: Mapping[str, Media]) -> None:
        kinds = {Image: "images", Text: "texts", Figure: "figures"}
        names = " and ".join(dict.fromkeys(type(logger).__name__ for logger in self._started))
        for name, item in media.items():
            if names and type(item) not in self._unshown:
                self._unshown.add(type(item))
                warnings.warn(
                    f"{names} cannot show {kinds[type(item)]}, so {name!r} is dropped, and so are all that follow. Add a logger "
                    "that shows them, as loggers=[sheer.TensorBoard()] does.",
                    SheerWarning,
                    stacklevel=user_level(),
                )


def close_figures(media: Mapping[str, Media]) -> None:
    """Take figures out of pyplot's list of all that are open. One made without pyplot is in none."""
    pyplot = sys.modules.get("matplotlib.pyplot")  # not imported here: it would choose a display
    for item in media.values():
        if pyplot is not None and isinstance(item, Figure):
            pyplot.close(item.figure)
