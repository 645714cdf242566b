"""Schedule: what decides the batches and learning rates of a run, as one value."""

from dataclasses import dataclass, field

from distgrow.core.active_experts import ActiveExperts, ExpertWeights
from distgrow.core.average import AverageSpec
from distgrow.core.budget import Budget
from distgrow.core.endless import ENDLESS, ONE_STAGE, refuse_epochs
from distgrow.core.lr import LR
from distgrow.core.noise_stats import Measuring
from distgrow.core.optimizer_plan import AtGrowth
from distgrow.core.sampling import SamplingSpec
from distgrow.core.scaling import Group
from distgrow.core.sparsity import Sparsity
from distgrow.core.stages import Stages
from distgrow.growth.base import GrowthPolicy, Measure
from distgrow.growth.controller import Controller


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Hold the settings that every decision of a run follows from; the data and the ranks are not known yet."""

    growth: GrowthPolicy
    budget: Budget
    stages: Stages = field(default_factory=Stages)
    lr: LR = field(default_factory=LR)
    average: AverageSpec | None = None
    active: ActiveExperts | None = None
    weights: ExpertWeights | None = None
    sampling: SamplingSpec | None = None
    sparsity: Sparsity | None = None
    needs: frozenset[Measure] = frozenset()  #: what the optimizer needs to be measured, beside what growth needs
    at_growth: AtGrowth = field(default_factory=AtGrowth)

    def controller(
        self,
        epoch: int,
        world: int = 1,
        *,
        group: Group | None = None,
        max_micro: int = 64,
        measuring: Measuring | None = None,
        seed: int = 0,
    ) -> Controller:
        """Return the decisions of this schedule for a training set of `epoch` samples on `world` ranks.

        Args:
            epoch: Samples of one pass over the training set; ENDLESS if it has no length.
            world: Ranks of the group at hand.
            group: Set if groups of other sizes may follow; None: `world` ranks throughout.
            max_micro: Rows of a micro-batch, at most.
            measuring: How gradient noise is measured; None: as by default.
            seed: Of the random numbers of every update.

        Raises:
            ConfigError: The settings do not go with one another or with the training set.
        """
        return Controller(
            growth=self.growth,
            stages=self.stages if epoch < ENDLESS else self._stages_in_samples(),
            lr=self.lr,
            average=self.average,
            active=self.active,
            weights=self.weights,
            sampling=self.sampling,
            sparsity=self.sparsity,
            needs=self.needs,
            at_growth=self.at_growth,
            budget=self.budget.at_density(1.0 if self.sparsity is None else self.sparsity.average_density),
            epoch=epoch,
            world=world,
            group=group,
            max_micro=max_micro,
            measuring=measuring or Measuring(),
            seed=seed,
        )

    def _stages_in_samples(self) -> Stages:
        """Return the stages of a run over a training set without a length. ConfigError if anything is in epochs."""
        refuse_epochs({"growth": self.growth, "lr": self.lr, "average": self.average, "budget": self.budget})
        if self.growth.sets_stages:
            return self.stages
        if self.growth.last_stage == 0 and self.stages == Stages():
            return ONE_STAGE
        refuse_epochs({"stages": self.stages})
        return self.stages
