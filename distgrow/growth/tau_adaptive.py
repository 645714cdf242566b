"""Growth that follows the best batch of a strongly convex finite sum, as measured gradient noise tells it."""

import math
from typing import Literal

from distgrow.core.endless import ENDLESS
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Span
from distgrow.core.progress import Progress
from distgrow.core.spec import PosFloat, by_position
from distgrow.core.stages import Stages, Trigger
from distgrow.growth.base import Moment
from distgrow.growth.target_batch import TargetBatch
from distgrow.theory.finite_sum import FiniteSum


class TauAdaptive(TargetBatch):
    """b follows τ*, the best batch of SGD on a strongly convex finite sum, its h̄ estimated (after Alfarra et al. 2020).

    τ* is that of `tau_nice`. h̄, the mean ‖∇f_i‖² at the optimum, is estimated by (n−1)/n · tr Σ, the samples' variance
    at the present point.
    """

    kind: Literal["tau_adaptive"] = "tau_adaptive"
    smoothness: PosFloat
    """L of the mean loss."""
    largest_smoothness: PosFloat
    """L_max, the largest of any sample's loss; between L and nL."""
    mu: PosFloat
    """μ, strong convexity."""
    epsilon: PosFloat
    """ε, target of E‖θ − θ*‖²."""

    @property
    def plain_sgd(self) -> bool:
        return True

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        if span.epoch == ENDLESS:
            raise ConfigError("growth.kind=tau_adaptive goes by the number of samples, which a stream does not tell")
        try:
            self._sum(span.epoch, 1.0)
        except ValueError as error:
            raise ConfigError(f"growth, with the training set's {span.epoch} samples: {error}") from None
        return super().trigger(stages, lr, span)

    def target(self, variance: float, gradient_sq: float, progress: Progress, now: Moment) -> float:
        best = self._sum(now.epoch, (1 - 1 / now.epoch) * variance).best_batch(self.epsilon)
        return best if math.isfinite(best) else float(now.epoch)

    def _sum(self, samples: int, optimum_sq: float) -> FiniteSum:
        return FiniteSum(
            samples=samples,
            smoothness=self.smoothness,
            largest_smoothness=self.largest_smoothness,
            mu=self.mu,
            optimum_sq=optimum_sq,
        )


tau_adaptive = by_position(TauAdaptive, "start", "cap", "factor")
