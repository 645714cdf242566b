"""Budget: when a run is over, in epochs, samples, tokens, updates, gradient evaluations or compute."""

import math
from typing import Annotated

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.progress import Progress
from distgrow.core.spec import PosFloat, PosInt, Spec, at_least, by_position, one_of
from distgrow.core.stages import LONGEST, interval

#: Updates after which a budget in tokens has counted some.
UNCOUNTED = 20


class Budget(Spec):
    """When a run is over: exactly one of these, or tokens with about as many samples."""

    epochs: PosFloat | None = None
    """Passes over the training set, counted in applied samples and rounded up to a whole one."""
    samples: PosInt | None = None
    """Applied samples."""
    steps: Annotated[int, Field(ge=1, le=LONGEST)] | None = None
    """Applied updates."""
    sfo: PosInt | None = None
    """Gradient evaluations: applied, skipped and probes; work that a fault makes redo is not charged to it."""
    compute: PosInt | None = None
    """Applied samples times the density of the model: the samples of a dense run that costs as much. The run's samples
    follow from `sparsity` and `model.active`; without both they are these."""
    tokens: PosInt | None = None
    """Applied tokens. If samples have different numbers of them, they are counted, the update that reaches them is the
    last, and `samples` says about how many samples they are, which stages and decays go by."""

    @model_validator(mode="after")
    def _one_unit(self) -> "Budget":
        units = ("epochs", "samples", "steps", "sfo", "compute")
        one_of(self, *units, *(["tokens"] if self.samples is None else []))
        return self

    def in_samples(self, tokens: int | None) -> "Budget":
        """Return the budget in samples, if it is in tokens, of which every sample has `tokens`; None: they differ.

        Raises:
            ConfigError: They differ, and nothing says how many samples there are.
        """
        if self.tokens is None:
            return self
        if tokens is not None:
            return Budget(samples=interval(self.tokens, tokens, "budget.tokens"))
        if self.samples is None:
            raise ConfigError(
                f"budget.tokens={self.tokens} needs to know the tokens of a sample: give tokens=…, their number if all "
                "have as many, to fit() or Task (task.tokens of a target); if they differ, say in budget.samples about "
                "how many samples these tokens are, which stages and decays then go by"
            )
        return self

    def at_density(self, average: float) -> "Budget":
        """Return the budget in samples, if it is in compute, for a run of this average density."""
        return self if self.compute is None else Budget(samples=at_least(self.compute / average))

    def check_counted(self, progress: Progress) -> None:
        """Check that tokens are counted if the budget is in them, which otherwise never ends.

        Raises:
            ConfigError: The first updates counted none.
        """
        if self.tokens is not None and progress.step == UNCOUNTED and not progress.tokens:
            raise ConfigError(
                f"budget.tokens={self.tokens} would never be spent: the first {UNCOUNTED} updates counted no tokens; "
                "let tokens(batch), or items(batch), return how many there are, or give the budget in samples"
            )

    def total(self, epoch: int) -> int | None:
        """Return the samples that the budget allows, or None if it is in steps."""
        if self.steps is not None:
            return None
        total = (self.epochs or 0) * epoch or self.samples or self.sfo or self.compute or 0
        if total > LONGEST:
            raise ConfigError(f"a budget of {total} samples is more than a run can have (2**62); lower it")
        return max(1, at_least(total))

    def left(self, progress: Progress, epoch: int) -> float:
        """Return the samples left, or inf if the budget is in steps, or in counted tokens, and some are left."""
        if self.tokens is not None:
            return math.inf if progress.tokens < self.tokens else 0
        return self.planned(progress, epoch)

    def planned(self, progress: Progress, epoch: int) -> float:
        """Return the samples that are probably left: `left`, but for tokens that are still to be counted."""
        if self.steps is not None:
            return math.inf if progress.step < self.steps else 0
        total = self.total(epoch) or 0
        return total - (progress.ledger.applied if self.sfo is None else progress.ledger.first_time)


budget = by_position(Budget)
