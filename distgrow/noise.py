"""Noise: smoothed |∇f|², tr Σ and the progress test, from gradients already computed; pure, and knows no engine.

The B samples of an update come in parts: the micro-batches of all ranks. Part i, n_i samples with mean gradient g_i,
has E|g_i|² = |G|² + tr Σ/n_i, so Σ n_i|g_i|²/B over K parts has the expectation of |g|² at B/K samples, whatever
the n_i are; with the squared norm of the update's own gradient, at B samples, that is McCandlish's pair [D].
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from distgrow.noise_theory import grad_sq_estimate, noise_scale, variance_estimate
from distgrow.spec import PosInt, Spec


class Measuring(Spec):
    """How often gradient noise is measured, and how long that is remembered."""

    every: PosInt | None = None
    """Updates from one measured one to the next. None: 1 for growth that measures, 16 for any other; where one rank
    takes a batch in one micro-batch, 16 and never, since it has to be cut in two for it."""
    window: PosInt = 100
    """Measured updates that the means of |∇f|² and tr Σ remember."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A forgetting mean with its standard error: plain sums, corrected for their beginning."""

    count: int = 0  #: values added
    weight: float = 0.0  #: Σ w
    weight_sq: float = 0.0  #: Σ w²
    total: float = 0.0  #: Σ w·x
    square: float = 0.0  #: Σ w·x²

    def add(self, value: float, keep: float) -> "Mean":
        """With one more value; all before it count `keep` times as much as they did."""
        return Mean(
            count=self.count + 1,
            weight=keep * self.weight + 1,
            weight_sq=keep**2 * self.weight_sq + 1,
            total=keep * self.total + value,
            square=keep * self.square + value * value,
        )

    @property
    def value(self) -> float:
        """The mean; NaN before the first value."""
        return self.total / self.weight if self.weight else math.nan

    @property
    def error(self) -> float:
        """The mean's standard error, if the values are independent; inf before the second."""
        share = self.weight_sq / self.weight**2 if self.weight else 1.0
        if share >= 1:
            return math.inf
        spread = max(0.0, self.square / self.weight - self.value**2) / (1 - share)
        return math.sqrt(spread * share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the engine found at one update beside its gradient; squares in gradient² units, equal on every rank."""

    parts_sq: float = math.nan  #: mean of the parts' |g_i|², weighted by their samples
    batch_sq: float = math.nan  #: |g|² of the whole batch, before clipping
    product: float = math.nan  #: ⟨g, u⟩ with u the direction of the update before it, in its optimizer's units


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """The smoothed statistics that a run carries along; all of them, and so all decisions, equal on every rank."""

    grad_sq: Mean = field(default_factory=Mean)  #: |∇f|², as if samples were drawn endlessly; see `gradient_sq`
    variance: Mean = field(default_factory=Mean)  #: tr Σ
    product: Mean = field(default_factory=Mean)  #: the progress test, since the stage began

    def after(self, batch: int, parts: int, window: int, found: Measured) -> "Noise":
        """With what one applied update of `batch` samples in `parts` parts has shown; `window` as in Measuring."""
        noise = self
        if window and parts > 1 and math.isfinite(found.parts_sq) and math.isfinite(found.batch_sq):
            pair, sizes, keep = (found.parts_sq, found.batch_sq), (batch / parts, batch), 1 - 1 / window
            grad_sq = self.grad_sq.add(grad_sq_estimate(*pair, *sizes), keep)
            variance = self.variance.add(variance_estimate(*pair, *sizes), keep)
            noise = replace(self, grad_sq=grad_sq, variance=variance)
        if math.isfinite(found.product):
            age = self.product.count  # value i of k counts i/k: what came right after the change is forgotten
            noise = replace(noise, product=self.product.add(found.product, age / (age + 1)))
        return noise

    def on_new_stage(self) -> "Noise":
        """Without what depends on batch and learning rate."""
        return replace(self, product=Mean())

    def gradient_sq(self, population: float = math.inf) -> float:
        """|∇f|², where the samples of an epoch are drawn without replacement from `population` [D]; NaN until known."""
        return self.grad_sq.value + self.variance.value / population

    def scale(self, population: float = math.inf) -> float:
        """B_simple = tr Σ/|∇f|², samples: a ratio of means; inf where |∇f|² is lost in noise, NaN until known."""
        gradient_sq = self.gradient_sq(population)
        return gradient_sq if math.isnan(gradient_sq) else noise_scale(self.variance.value, gradient_sq)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From plain numbers."""
        return cls(**{name: Mean(**mean) for name, mean in values.items()})
