"""Specs of the services that a run can report to; importing this loads none of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, Field

from distgrow.core.errors import ConfigError
from distgrow.core.spec import Spec
from distgrow.tracking.events import Evaluation, GradientProbe, Step
from distgrow.tracking.rate_events import RateChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Hold the numbers of an event, at an update."""

    kind: str  #: step, eval, probe or lr_choice
    step: int  #: applied updates
    time_s: float  #: when it was logged, seconds since 1970
    figures: Mapping[str, float]  #: by their names in metrics.jsonl


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """Hold what a service is opened for."""

    folder: Path  #: run.dir
    settings: Mapping[str, Any]  #: its config, resolved
    id: str  #: every service finds the run again by it


#: The kinds of events that have points.
KINDS: tuple[str, ...] = (Step.kind, Evaluation.kind, GradientProbe.kind, RateChoice.kind)
#: How a run came to its end.
Ending = Literal["done", "stopped", "failed"]


class Service(Protocol):
    """Report one run to a service."""

    seen: Mapping[str, int]
    """The last update of each kind of point that the service held when it was opened."""

    def publish(self, points: Sequence[Point]) -> None:
        """Send points, those of each kind in the order of updates. After any exception they are sent again."""
        ...

    def finish(self, ending: Ending) -> None:
        """Say how the run has ended, and wait until everything has been sent."""
        ...


class WandB(Spec):
    """Weights & Biases."""

    kind: Literal["wandb"] = "wandb"
    project: str = "distgrow"
    """The project."""
    entity: str | None = None
    """The team or user; default: the account's own."""
    name: str | None = None
    """The run's name there; default: that of run.dir."""
    mode: Literal["online", "offline"] = "online"
    """offline: into RUN/wandb, for `wandb sync`."""

    def check(self) -> None:
        """Raise ConfigError if the package is not installed."""
        needs("wandb", "wandb")

    def open(self, opening: Opening) -> Service:
        """Open the run at the service."""
        from distgrow.tracking.wandb import WandBRun

        return WandBRun(self, opening)


class MLflow(Spec):
    """MLflow."""

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = None
    """The tracking server or store, e.g. sqlite:///mlflow.db; default: MLflow's own (MLFLOW_TRACKING_URI)."""
    experiment: str = "distgrow"
    """The experiment; it is made if there is none."""
    name: str | None = None
    """The run's name there; default: that of run.dir."""

    def check(self) -> None:
        """Raise ConfigError if the package is not installed."""
        needs("mlflow", "mlflow")

    def open(self, opening: Opening) -> Service:
        """Open the run at the service."""
        from distgrow.tracking.mlflow import MLflowRun

        return MLflowRun(self, opening)


def _each_once(specs: "list[TrackerSpec]") -> "list[TrackerSpec]":
    kinds = [spec.kind for spec in specs]
    if twice := {kind for kind in kinds if kinds.count(kind) > 1}:
        raise ConfigError(f"names {', '.join(sorted(twice))} more than once; a run reports to each service once")
    return specs


TrackerSpec = Annotated[WandB | MLflow, Field(discriminator="kind")]
TrackerSpecs = Annotated[list[TrackerSpec], AfterValidator(_each_once)]


def needs(package: str, extra: str) -> None:
    """Raise ConfigError if a package is not installed."""
    if find_spec(package) is None:
        raise ConfigError(f"run.trackers: {package} is not installed; pip install 'distgrow[{extra}]', or leave it out")
