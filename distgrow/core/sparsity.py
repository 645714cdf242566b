"""Sparsity: how dense the model is along the samples of a run that prunes it. Pure arithmetic."""

import math
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.progress import Progress
from distgrow.core.spec import Spec, at_least, by_position, checked_expression
from distgrow.theory import pruning


class Sparsity(Spec):
    """Prune the model while it trains: the smallest weights become 0 for good, over all kernels together."""

    target: Annotated[float, Field(ge=0, lt=1)]
    """Share of the kernels' weights that are 0 in the end. 0 prunes nothing."""
    start: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the run's compute after which pruning begins."""
    end: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of the run's compute after which pruning has ended. In between the density falls linearly in compute."""
    every: Annotated[float, Field(ge=1e-6, lt=1)] = 0.01
    """Share of the weights left that one pruning takes, at most."""
    keep_dense: list[str] = []
    """Kernels that are not pruned: regular expressions that are searched for in their names, such as "head"."""

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> "Sparsity":
        if self.end <= self.start:
            raise ConfigError(f"end={self.end:g} must be above start={self.start:g}: raise end or lower start")
        return self

    @field_validator("keep_dense")
    @classmethod
    def _are_expressions(cls, values: list[str]) -> list[str]:
        return [checked_expression("keep_dense", value) for value in values]

    def check(self, budget: Budget, adaptive: str) -> None:
        """Check that the samples of a run are known beforehand, as pruning goes by shares of them.

        Args:
            budget: The run's.
            adaptive: The kind of growth, whose batches are decided by measurements.

        Raises:
            ConfigError: They are not.
        """
        if self.target and budget.steps is not None:
            raise ConfigError(
                f"sparsity.target={self.target:g} goes by shares of the run's compute, which budget.steps="
                f"{budget.steps} leaves open, as growth.kind={adaptive} decides batches by measurements: give the "
                "budget in samples, epochs, sfo or compute, choose growth by a schedule, or leave out sparsity"
            )

    @property
    def prunings(self) -> int:
        """Return how often the run prunes: the fewest equal shares, each of `every` at most, that reach the target."""
        return at_least(math.log1p(-self.target) / math.log1p(-self.every)) if self.target else 0

    @property
    def average_density(self) -> float:
        """Return the mean density along the samples of the run."""
        return pruning.average_density(self.target, self.start, self.end)

    def density(self, samples: float, total: int) -> float:
        """Return the density at a position of the samples axis.

        The k-th of K prunings leaves (1 − target)^(k/K). It comes when theory/pruning.py's smooth density is halfway
        to it, so that the compute of the run is that of the smooth one. No batch is in this, so growth changes nothing.

        Args:
            samples: The position.
            total: Samples of the whole run.
        """
        if not self.target:
            return 1.0
        first, last = (share * total for share in pruning.pruned_samples(self.target, self.start, self.end))
        done = 1.0 if samples >= last else max(0.0, (samples - first) / (last - first))
        return (1 - self.target) ** (math.floor(self.prunings * done + 0.5) / self.prunings)

    def planned(self, progress: Progress, batch: int, total: int) -> float:
        """Return the density of the next update, of `batch` samples: that of its middle, and never one that rises."""
        return min(progress.density, self.density(progress.ledger.applied + batch / 2, total))


sparsity = by_position(Sparsity, "target", "start", "end")
