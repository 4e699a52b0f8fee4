"""MLflow tracking."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sheer.errors import MissingPackageError
from sheer.events import RunInfo
from sheer.loggers.values import flattened, pixels
from sheer.metrics import Image, Media, Text
from sheer.rundir import plain

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


class MLflow:
    """Logs to a run of MLflow. A resumed run goes on as the same MLflow run.

    Hyper-parameters are params, the settings the artifact `settings.json`, images, figures and texts artifacts too. In names,
    what MLflow does not take becomes `_`: `val/top@5` is `val/top_5` there.

    Args:
        experiment: the experiment's name; it is made if there is none.
        name: the name shown for the run; None: MLflow makes one up.
        tracking_uri: where to log, as "sqlite:///mlflow.db" or "https://mlflow.example.org"; None: what MLflow is set to, by
            `mlflow.set_tracking_uri` or MLFLOW_TRACKING_URI.
        tags: labels, with values.
        run_id: an existing run to go on with; None: the one in the checkpoint, or a new one.

    Raises:
        MissingPackageError: mlflow is not installed.
    """

    def __init__(
        self,
        experiment: str = "Default",
        name: str | None = None,
        *,
        tracking_uri: str | None = None,
        tags: Mapping[str, str] | None = None,
        run_id: str | None = None,
    ) -> None:
        try:
            from mlflow.tracking import MlflowClient  # noqa: F401
        except ImportError as error:
            raise MissingPackageError('sheer.MLflow needs mlflow. Install it: pip install "sheer[mlflow]"') from error
        self.experiment, self.name, self.tracking_uri = experiment, name, tracking_uri
        self.tags = dict(tags or {})
        self.run_id = run_id
        self._given_id = run_id
        self._run: str | None = None
        self._is_open = False
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient | None:
        """The `MlflowClient`, to be used with `run_id`; None before the run starts."""
        return self._client

    def start(self, info: RunInfo) -> None:
        """Open an MLflow run, or go on with the one there was."""
        from mlflow.tracking import MlflowClient

        if info.run_id != self._run:
            self._run, self.run_id = info.run_id, self._given_id
        client = self._client = MlflowClient(self.tracking_uri)
        if self.run_id is None:
            self.run_id = self._create(client)
            self._log_params(client, self.run_id, flattened(info.hparams))
        client.update_run(self.run_id, status="RUNNING")
        self._is_open = True
        client.log_dict(self.run_id, plain(info.settings), "settings.json")

    def _create(self, client: MlflowClient) -> str:
        from mlflow.tracking.context.registry import resolve_tags

        found = client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found is not None else client.create_experiment(self.experiment)
        # resolve_tags adds what mlflow.start_run would: the user, the script, its commit.
        run = client.create_run(experiment, tags=resolve_tags(self.tags), run_name=self.name)
        run_id: str = run.info.run_id
        return run_id

    def _log_params(self, client: MlflowClient, run_id: str, hparams: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = iter([Param(allowed(name), str(value)) for name, value in hparams.items()])
        while batch := list(itertools.islice(params, 100)):  # the most that MLflow takes at once
            client.log_batch(run_id, params=batch)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a value for each metric."""
        from mlflow.entities import Metric

        assert self._client is not None
        now = int(time.time() * 1000)
        values = [Metric(allowed(name), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=values)

    def log_media(self, step: int, media: Mapping[str, Media]) -> None:
        """Add images, with their steps, and files `figures/<name>/<step>.png` and `texts/<name>/<step>.txt`."""
        assert self._client is not None
        for name, item in media.items():
            if isinstance(item, Image):
                self._client.log_image(self.run_id, pixels(item), key=allowed(name), step=step)
            elif isinstance(item, Text):
                self._client.log_text(self.run_id, item.text, f"texts/{allowed(name)}/{step:08}.txt")
            else:
                self._client.log_figure(self.run_id, item.figure, f"figures/{allowed(name)}/{step:08}.png")

    def close(self) -> None:
        """Mark the run as finished, or as failed where an error ends it."""
        if self._client is not None and self._is_open:
            self._is_open = False
            self._client.set_terminated(self.run_id, "FINISHED" if sys.exception() is None else "FAILED")

    def state_dict(self) -> dict[str, Any]:
        """Return which run it is, and its MLflow id."""
        return {"run": self._run, "run_id": self.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the same MLflow run."""
        self._run, self.run_id = state["run"], self._given_id or state["run_id"]


def allowed(name: str) -> str:
    """Return a name with `_` for each character that MLflow does not take in the names of metrics, params and images."""
    return re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)
