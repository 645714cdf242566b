"""Exponential growth with the stage lengths that are optimal for a budget."""

import math
from typing import ClassVar, Literal

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Span
from distgrow.core.spec import by_position
from distgrow.core.stages import Geometric, Stages, Trigger
from distgrow.growth.base import needs_samples
from distgrow.growth.objective import Aimed
from distgrow.theory.sgd import optimal_sample_ratio


class Optimal(Aimed):
    """Exponential growth whose stage lengths are optimal for δ, γ (of lr.rule) and the budget: samples ∝ (δ/γ)^2m."""

    kind: Literal["optimal"] = "optimal"
    sets_stages: ClassVar[bool] = True

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        self.needs_cap("cuts the budget into the stages up to the cap")
        needs_samples("growth.kind=optimal", span)
        count, ratio = (
            int(self.last_stage) + 1,
            optimal_sample_ratio(self.factor, self.rule(lr).factor_for(self.factor)),
        )
        first = span.samples / math.fsum(ratio**m for m in range(count))
        shortest = first * min(1.0, ratio ** (count - 1))
        if shortest < 1:
            raise ConfigError(
                f"growth.kind=optimal: the shortest of {count} stages would have {shortest:.3g} samples; "
                "raise budget, lower growth.cap or bring lr.rule closer to sqrt"
            )
        return Geometric(axis="samples", first=first, ratio=ratio)


optimal = by_position(Optimal, "start", "factor", "cap")
