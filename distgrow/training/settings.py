"""Settings: all specs of one run, as a config or the arguments of fit() give them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from distgrow.core.scaling import Group
from distgrow.core.spec import Spec
from distgrow.engine.compatible import check_compatible
from distgrow.engine.spec import EngineSpec, Torch, most_rows
from distgrow.growth.controller import Controller
from distgrow.growth.schedule import Schedule
from distgrow.optim import OptimizerSpec
from distgrow.optim.sgd import SGD
from distgrow.training.spec import RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Hold the specs of one run."""

    schedule: Schedule
    optimizer: OptimizerSpec = field(default_factory=SGD)
    engine: EngineSpec = field(default_factory=Torch)
    run: RunSpec = field(default_factory=RunSpec)
    storage: str | None = None  #: URI of the checkpoints' storage; None: the run's folder
    about: Mapping[str, Any] = field(default_factory=dict)  #: recorded beside the specs

    def check(self) -> None:
        """Check that growth, optimizer and engine go together.

        Raises:
            ConfigError: they do not.
        """
        check_compatible(self.schedule.growth, self.optimizer, self.engine)

    @property
    def name(self) -> str:
        """The name of the run, for {name} in `run.dir`: the task's kind."""
        return str((self.about.get("task") or {}).get("kind", "run"))

    def kept_in(self, path: str) -> "Settings":
        """Return the same settings with another `run.dir`."""
        return replace(self, run=self.run.model_copy(update={"dir": path}))

    def controller(self, epoch: int, world: int, group: Group | None = None) -> Controller:
        """Return the schedule on `world` ranks for a training set of `epoch` samples.

        Args:
            epoch: Samples of the training set.
            world: Ranks.
            group: The rule by which groups of other sizes follow. None: these ranks throughout.
        """
        return self.schedule.controller(
            epoch,
            world,
            group=group,
            max_micro=most_rows(self.engine.max_micro, epoch),
            measuring=self.run.noise,
            seed=self.run.seed,
        )

    def specs(self) -> dict[str, Spec]:
        """Return the specs by their keys of a config."""
        plan = self.schedule
        specs: dict[str, Spec] = {"growth": plan.growth, "stages": plan.stages, "lr": plan.lr}
        return specs | {"optimizer": self.optimizer, "engine": self.engine, "budget": plan.budget, "run": self.run}

    def recorded(self) -> dict[str, Any]:
        """Return what config.yaml records of the run."""
        return {**self.about, **{name: spec.model_dump(mode="json") for name, spec in self.specs().items()}}
