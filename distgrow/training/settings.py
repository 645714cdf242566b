"""Settings: all specs of a run's training. fit() makes them of its arguments; a config adds a task and a launch."""

from collections.abc import Callable, Mapping
from typing import Any, Self

from distgrow.core.active_experts import ActiveExperts, ExpertWeights
from distgrow.core.average import Average
from distgrow.core.budget import Budget
from distgrow.core.counted import counted
from distgrow.core.endless import ENDLESS, refuse_epochs
from distgrow.core.errors import ConfigError
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.lr import LR
from distgrow.core.sampling import Sampling
from distgrow.core.scaling import Group
from distgrow.core.sparsity import Sparsity
from distgrow.core.spec import Spec
from distgrow.core.stages import Stages
from distgrow.engine.ability import Can
from distgrow.engine.compatible import (
    check_ahead,
    check_branching,
    check_compatible,
    check_drawn_sizes,
    check_extrapolation,
    check_prunes,
)
from distgrow.engine.spec import EngineSpec, Torch, most_rows
from distgrow.growth.base import GrowthPolicy, Measure, with_rule
from distgrow.growth.controller import Controller
from distgrow.growth.schedule import Schedule
from distgrow.optim import OptimizerSpec
from distgrow.optim.sgd import SGD
from distgrow.training.init import Init
from distgrow.training.spec import RunSpec


class Settings(Spec):
    """Hold the specs of a run's training."""

    growth: GrowthPolicy
    """How the batch grows."""
    stages: Stages = Stages()
    """How long stages are."""
    lr: LR = LR()
    """The learning rate."""
    optimizer: OptimizerSpec = SGD()
    """The optimizer."""
    average: Average | None = None
    """An average of the parameters, evaluated beside them and kept in checkpoints. Default: none."""
    sampling: Sampling | None = None
    """How the rows of an update are drawn. Default: along shuffled passes, each sample once an epoch."""
    extrapolate: Extrapolate | None = None
    """At which shifted point gradients are evaluated. Default: at the parameters."""
    sparsity: Sparsity | None = None
    """How the model is pruned while it trains. Default: it stays dense."""
    init: Init | None = None
    """The weights that a new run begins with: a run's folder, a file, or these keys. Default: the model's own."""
    engine: EngineSpec = Torch()
    """What computes the updates: plain torch, DeepSpeed, FSDP, or asynchronous workers."""
    budget: Budget
    """When the run is over."""
    run: RunSpec = RunSpec()
    """Folder, seed, checkpoints, evaluation, logging and loading."""

    @classmethod
    def of(cls, specs: Mapping[str, Any]) -> Self:
        """Return the settings of those specs that are not None, by their keys."""
        return cls(**{name: spec for name, spec in specs.items() if spec is not None})

    def check(self) -> None:
        """Check that growth, optimizer and engine go together.

        Raises:
            ConfigError: they do not.
        """
        check_compatible(self.growth, self.optimizer, self.engine)
        if Can.REPEAT not in self.engine.can and self.lr.unknown:
            raise ConfigError(
                f"lr.base=auto compares short runs, and with engine.kind={self.engine.kind} delays differ from run to "
                "run: give lr.base a number, such as what 'distgrow range-test' finds with engine.kind=torch"
            )
        noise = self.run.noise
        if noise.every is not None and Can.MEASURE_NOISE not in self.engine.can:
            raise ConfigError(
                f"run.noise.every={noise.every} measures gradient noise, which engine.kind={self.engine.kind} does "
                "not: leave it out, or use engine.kind=torch"
            )
        if noise.by_parameter and Can.MEASURE_PARAMETERS not in self.engine.can:
            raise ConfigError(
                f"run.noise.by_parameter=true measures whole gradients by micro-batches, which engine.kind="
                f"{self.engine.kind} does not show: use engine.kind=torch, or leave it out"
            )
        parts: dict[str, Any] = {"growth": self.growth, "optimizer": self.optimizer}
        parts |= {"engine": self.engine, "measuring": noise, "budget": self.budget}
        if self.extrapolate is not None:
            check_extrapolation(self.extrapolate, **parts)
        check_branching(self.growth, self.engine, self.budget, self.sampling, self.sparsity)
        check_drawn_sizes(self.sampling, self.engine, self.extrapolate)
        check_prunes(self.sparsity, self.engine, self.extrapolate)
        others = {
            "extrapolate": self.extrapolate is not None,
            "sparsity": self.sparsity is not None,
            "a sampling of random sizes": self.sampling is not None and self.sampling.draws_size,
        }
        check_ahead(**parts, others=others)

    def kept_in(self, path: str) -> Self:
        """Return the same settings with another `run.dir`."""
        return self.model_copy(update={"run": self.run.model_copy(update={"dir": path})})

    def with_rate(self, rate: float) -> Self:
        """Return the same settings with η₀ = `rate`."""
        return self.model_copy(update={"lr": self.lr.at(rate)})

    def in_samples(self, tokens: Any) -> Self:
        """Return the same settings with what is in tokens or compute in samples.

        Args:
            tokens: Tokens of every sample, if that is a number; else they differ, or nobody knows.

        Raises:
            ConfigError: Something is in tokens, and samples have different numbers of them, or nobody knows.
        """
        each = tokens if isinstance(tokens, int) else None
        budget = self.budget.in_samples(each).at_density(self._average_density())
        stages = self.stages.model_copy(update={"every": self.stages.every.in_samples(each)})
        changed = {"stages": stages, "budget": budget, "run": self.run.in_samples(each)}
        return self.model_copy(update=changed)

    def schedule(self) -> Schedule:
        """Return what decides batch size, learning rate and end."""
        return Schedule(
            growth=self.growth,
            stages=self.stages,
            lr=with_rule(self.growth, self.lr, self.optimizer.growth_rule),
            average=self.average,
            active=self.active_experts(),
            weights=self.expert_weights(),
            sampling=self.sampling,
            sparsity=self.sparsity,
            at_growth=self.optimizer.at_growth,
            budget=self.budget,
            needs=frozenset({Measure.NOISE} if self.optimizer.goes_by_parts else ()),
        )

    def active_experts(self) -> ActiveExperts | None:
        """Return how the number of active experts changes; None: it does not, or the settings know no model."""
        return None

    def expert_weights(self) -> ExpertWeights | None:
        """Return the weights of a model with experts; None: it has none, or the settings know no model."""
        return None

    def _average_density(self) -> float:
        """Return the mean share of the weights that a sample costs, along the samples of the run.

        Raises:
            ConfigError: The budget is in compute, and pruning and a changing number of experts make it hard to tell.
        """
        weights, density = self.expert_weights(), 1.0 if self.sparsity is None else self.sparsity.average_density
        if weights is None:
            return density
        if self.budget.compute is not None and density < 1 and (active := self.active_experts()) is not None:
            raise ConfigError(
                f"budget.compute={self.budget.compute} leaves the samples of a run open whose sparsity and "
                f"model.active ({active.start} to {active.end}) change together: give budget.samples, or let one be"
            )
        return density * weights.average

    def controller_of(self, epoch: int, world: int, group: Group | None = None) -> Controller:
        """Return the schedule on `world` ranks for a training set of `epoch` samples.

        Args:
            epoch: Samples of the training set; ENDLESS if it has no length.
            world: Ranks.
            group: The rule by which groups of other sizes follow. None: these ranks throughout.
        """
        if epoch == ENDLESS:
            refuse_epochs({"run": self.run})
        most, rows = most_rows(self.engine.max_micro, epoch), self.extrapolate and self.extrapolate.group
        controller = self.schedule().controller(
            epoch,
            world,
            group=group,
            max_micro=min(most, rows or most),
            measuring=self.run.noise,
            seed=self.run.seed,
        )
        return controller if rows is None else in_groups(controller, rows)

    def planned(self, epoch: int, world: int, group: Group | None = None) -> Callable[[Budget], Controller]:
        """Return what makes the schedule under a budget, all else being as in the settings; see `controller_of`."""
        return lambda budget: self.model_copy(update={"budget": budget}).controller_of(epoch, world, group)

    def specs(self) -> dict[str, Spec]:
        """Return the specs of the training that are given, by their keys of a config."""
        specs = {name: getattr(self, name) for name in Settings.model_fields}
        return {name: spec for name, spec in specs.items() if spec is not None}

    def recorded(self) -> dict[str, Any]:
        """Return the specs of the training as config.yaml records them."""
        return {name: spec.model_dump(mode="json") for name, spec in self.specs().items()}


def in_groups(controller: Controller, rows: int) -> Controller:
    """Return the controller, of which each micro-batch will have `rows` rows.

    Raises:
        ConfigError: A batch of the run cannot be cut into such.
    """
    for stage, batch in controller.reach():
        if batch % (rows * controller.ranks(stage)):
            raise ConfigError(
                f"batch={batch} of stage {stage} on {counted(controller.ranks(stage), 'rank')} is no multiple of "
                f"extrapolate.group={rows} on each: choose growth, and a budget in steps or samples, so that every "
                "batch is one, or lower extrapolate.group"
            )
    return controller
