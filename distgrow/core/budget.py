"""Budget: when a run is over, in epochs, samples, updates or gradient evaluations."""

import math
from typing import Annotated

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.progress import Progress
from distgrow.core.spec import PosFloat, PosInt, Spec, at_least, by_position, one_of
from distgrow.core.stages import LONGEST


class Budget(Spec):
    """When a run is over: exactly one of the four."""

    epochs: PosFloat | None = None
    """Passes over the training set, counted in applied samples and rounded up to a whole one."""
    samples: PosInt | None = None
    """Applied samples."""
    steps: Annotated[int, Field(ge=1, le=LONGEST)] | None = None
    """Applied updates."""
    sfo: PosInt | None = None
    """Gradient evaluations: applied, skipped and probes; work that a fault makes redo is not charged to it."""

    @model_validator(mode="after")
    def _one_unit(self) -> "Budget":
        one_of(self, "epochs", "samples", "steps", "sfo")
        return self

    def total(self, epoch: int) -> int | None:
        """Return the samples that the budget allows, or None if it is in steps."""
        if self.steps is not None:
            return None
        total = (self.epochs or 0) * epoch or self.samples or self.sfo or 0
        if total > LONGEST:
            raise ConfigError(f"a budget of {total} samples is more than a run can have (2**62); lower it")
        return max(1, at_least(total))

    def left(self, progress: Progress, epoch: int) -> float:
        """Return the samples left, or inf if the budget is in steps and some are left."""
        total = self.total(epoch)
        if total is None:
            return math.inf if progress.step < (self.steps or 0) else 0
        return total - (progress.ledger.applied if self.sfo is None else progress.ledger.first_time)


budget = by_position(Budget)
