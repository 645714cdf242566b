"""A run at MLflow; the only file that imports mlflow."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from distgrow.tracking.spec import KINDS, Ending, MLflow, Opening, Point

_STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
#: Holds the run's own id, by which it is found again.
TAG = "distgrow.run.folder"
#: What MLflow takes in one call, at most.
METRICS, PARAMS = 1000, 100
#: The longest value of a parameter that every MLflow takes, in characters.
LONGEST = 500


class MLflowRun:
    """Send points as metrics at the update that they belong to, with names such as step/loss and eval/accuracy.

    The latest step/step is how far the store has come. A point sent again, with its own time, is the same point.
    """

    def __init__(self, spec: MLflow, opening: Opening) -> None:
        self._client = MlflowClient(tracking_uri=spec.uri)
        experiment = self._experiment(spec.experiment)
        found = self._client.search_runs([experiment], filter_string=f"tags.`{TAG}` = '{opening.id}'", max_results=1)
        self._id = found[0].info.run_id if found else self._create(spec, opening, experiment)
        self._client.update_run(self._id, status="RUNNING")
        latest = found[0].data.metrics if found else {}
        self.seen: Mapping[str, int] = {kind: int(latest.get(f"{kind}/step", -1)) for kind in KINDS}

    def _create(self, spec: MLflow, opening: Opening, experiment: str) -> str:
        name = spec.name or opening.folder.resolve().name
        run = self._client.create_run(experiment, run_name=name, tags={TAG: opening.id})
        params = [Param(key, value[:LONGEST]) for key, value in flat(opening.settings)]
        for first in range(0, len(params), PARAMS):
            self._client.log_batch(run.info.run_id, params=params[first : first + PARAMS])
        return run.info.run_id

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        try:
            return self._client.create_experiment(name)
        except MlflowException:  # another run has made it at the same moment
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id

    def publish(self, points: Sequence[Point]) -> None:
        """See Service."""
        for metrics in calls(points):
            self._client.log_batch(self._id, metrics=metrics)

    def finish(self, ending: Ending) -> None:
        """See Service."""
        self._client.set_terminated(self._id, status=_STATUS[ending])


def calls(points: Sequence[Point]) -> Iterator[list[Metric]]:
    """Yield the metrics of each call: whole points, so that a run killed between two calls has none in part."""
    metrics: list[Metric] = []
    for point in points:
        added = _metrics(point)
        if metrics and len(metrics) + len(added) > METRICS:
            yield metrics
            metrics = []
        metrics += added
    if metrics:
        yield metrics


def _metrics(point: Point) -> list[Metric]:
    """Return the metrics of a point, /step last: a store that writes one by one then says no update too early."""
    names = sorted(point.figures, key=lambda name: name == "step")
    time_ms = round(point.time_s * 1000)
    return [Metric(f"{point.kind}/{name}", point.figures[name], time_ms, point.step) for name in names]


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as (dotted key, text)."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
