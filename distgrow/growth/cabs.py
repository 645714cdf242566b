"""CABS: growth that follows the variance of the gradient over the loss (arXiv 1612.05086)."""

from typing import Literal

from distgrow.core.progress import Progress
from distgrow.core.spec import by_position
from distgrow.growth.base import Measure, Moment
from distgrow.growth.target_batch import TargetBatch
from distgrow.theory.noise import cabs_batch


class CABS(TargetBatch):
    """b follows η·tr Σ/f (Balles et al. 2017): SGD without momentum, and a loss whose least value is near 0."""

    kind: Literal["cabs"] = "cabs"

    @property
    def needs(self) -> frozenset[Measure]:
        return frozenset({Measure.NOISE, Measure.LOSS})

    @property
    def plain_sgd(self) -> bool:
        return True

    def target(self, variance: float, gradient_sq: float, progress: Progress, now: Moment) -> float:
        loss = progress.noise.loss.end(self.confidence)
        return cabs_batch(now.lr, variance, loss) if loss > 0 and now.lr > 0 else 0.0


cabs = by_position(CABS, "start", "cap", "factor")
