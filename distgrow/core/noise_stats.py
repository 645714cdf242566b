"""Noise: smoothed |∇f|², tr Σ, loss and the progress test, from gradients already computed; pure, and knows no engine.

The B samples of an update come in parts: the micro-batches of all ranks. Part i, n_i samples with mean gradient g_i,
has E|g_i|² = |G|² + tr Σ/n_i, so Σ n_i|g_i|²/B over K parts has the expectation of |g|² at B/K samples, whatever
the n_i are; with the squared norm of the update's own gradient, at B samples, that is McCandlish's pair [D].

Samples are drawn without replacement, which at one place lowers the estimate of |G|² by tr Σ/n. Along a run that is
made up for: what is still to be drawn in an epoch is what has not been descended on, and has the larger gradient.
Nothing is added for it (benchmarks/tracked.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from distgrow.core.spec import PosInt, Spec
from distgrow.theory.noise import grad_sq_estimate, noise_scale, variance_estimate


class Measuring(Spec):
    """How often gradient noise is measured, and how long that is remembered."""

    every: PosInt | None = None
    """Updates from one measured one to the next. None: 1 for growth that measures, 16 for any other; where one rank
    takes a batch in one micro-batch, 16 and never, since it has to be cut in two for it."""
    window: PosInt | None = None
    """Measured updates that the means of |∇f|² and tr Σ remember, each by its samples. None: about an epoch, but 20
    to 100 of them."""

    by_parameter: bool = False
    """Measure each parameter's |∇f|² and tr Σ, too, and log them with every evaluation."""

    @property
    def asked(self) -> bool:
        """Return whether noise is to be measured even where a batch has to be cut for it."""
        return self.every is not None or self.by_parameter

    def memory(self, samples: int, epoch: int) -> int:
        """Return the window of means if measured updates are `samples` apart. Older ones belong to another |∇f|²."""
        return self.window or min(100, max(20, epoch // samples))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """Hold a forgetting mean with its standard error, as plain sums that are corrected for their beginning."""

    count: int = 0  #: values added
    weight: float = 0.0  #: Σ w
    weight_sq: float = 0.0  #: Σ w²
    total: float = 0.0  #: Σ w·x
    square: float = 0.0  #: Σ w·x²

    def add(self, value: float, keep: float, weight: float = 1.0) -> "Mean":
        """Return the mean with one more weighted value. The weights of all before it are multiplied by `keep`."""
        return Mean(
            count=self.count + 1,
            weight=keep * self.weight + weight,
            weight_sq=keep**2 * self.weight_sq + weight**2,
            total=keep * self.total + weight * value,
            square=keep * self.square + weight * value**2,
        )

    @property
    def value(self) -> float:
        """Return the mean, or NaN before the first value."""
        return self.total / self.weight if self.weight else math.nan

    @property
    def error(self) -> float:
        """Return the mean's standard error if the values are independent, or inf before the second.

        It is an upper bound if heavier values scatter less, as estimates from larger batches do.
        """
        share = self.weight_sq / self.weight**2 if self.weight else 1.0
        if share >= 1:
            return math.inf
        spread = max(0.0, self.square / self.weight - self.value**2) / (1 - share)
        return math.sqrt(spread * share)

    def end(self, errors: float) -> float:
        """Return the mean plus so many standard errors: an end of its confidence interval."""
        return self.value + errors * self.error if errors else self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """Hold the least squares line of a loss along the samples axis. Update i of k has the weight i/k: it forgets."""

    count: int = 0  #: updates
    samples: int = 0  #: of these updates
    weight: float = 0.0  #: Σ w
    x: float = 0.0  #: Σ w·x, x in samples
    y: float = 0.0  #: Σ w·y, y the loss
    xx: float = 0.0  #: Σ w·x²
    xy: float = 0.0  #: Σ w·x·y
    yy: float = 0.0  #: Σ w·y²

    def add(self, batch: int, loss: float) -> "Trend":
        """Return the trend with one more update of `batch` samples."""
        x, keep = self.samples + batch / 2, self.count / (self.count + 1)
        return Trend(
            count=self.count + 1,
            samples=self.samples + batch,
            weight=keep * self.weight + 1,
            x=keep * self.x + x,
            y=keep * self.y + loss,
            xx=keep * self.xx + x * x,
            xy=keep * self.xy + x * loss,
            yy=keep * self.yy + loss * loss,
        )

    @property
    def value(self) -> float:
        """Return the mean loss, or NaN before the first."""
        return self.y / self.weight if self.weight else math.nan

    @property
    def slope(self) -> float:
        """Return the slope, loss per sample, or NaN before the second update."""
        if self.count < 2:
            return math.nan
        spread = self.xx * self.weight - self.x**2
        return (self.xy * self.weight - self.x * self.y) / spread if spread > 0 else math.nan

    @property
    def slope_error(self) -> float:
        """Return the slope's standard error if the losses scatter independently, or inf until it is known.

        It is an upper bound, as w² ≤ w.
        """
        spread = self.xx - self.x**2 / self.weight if self.weight else 0.0
        if self.count < 3 or not spread > 0:
            return math.inf
        rest = self.yy - self.y**2 / self.weight - self.slope**2 * spread
        return math.sqrt(max(0.0, rest) / self.weight / spread)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Hold what the engine measured at one update beside its gradient, in gradient² units. Equal on every rank."""

    parts_sq: float = math.nan  #: mean of the parts' |g_i|², weighted by their samples
    batch_sq: float = math.nan  #: |g|² of the whole batch, before clipping
    product: float = math.nan  #: ⟨g, u⟩ with u the direction of the update before it, in its optimizer's units
    parts: int = 0  #: parts with items, if the loss is a mean over items; 0: all of the plan's


#: What an update has shown that was not measured.
NOTHING = Measured()


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Hold the smoothed statistics of a run. They, and so all decisions, are equal on every rank."""

    # the first three are means over samples, not updates: a small batch tells little once batches are large
    grad_sq: Mean = field(default_factory=Mean)  #: |∇f|²; single values may be negative
    variance: Mean = field(default_factory=Mean)  #: tr Σ
    loss: Mean = field(default_factory=Mean)  #: of the same updates as these two
    fresh: int = 0  #: updates that have shown these since the stage began
    product: Mean = field(default_factory=Mean)  #: the progress test, since the stage began
    trend: Trend = field(default_factory=Trend)  #: the loss, since the stage began

    def after(self, batch: int, parts: int, window: int, found: Measured, loss: float = math.nan) -> "Noise":
        """Return the statistics after an applied update of `batch` samples in `parts` parts; see Measuring.window."""
        grad_sq, variance, losses, fresh, product, trend = (
            self.grad_sq, self.variance, self.loss, self.fresh, self.product, self.trend
        )  # fmt: skip
        if window and parts > 1 and math.isfinite(found.parts_sq) and math.isfinite(found.batch_sq):
            pair, sizes, keep = (found.parts_sq, found.batch_sq), (batch / parts, batch), 1 - 1 / window
            grad_sq = grad_sq.add(grad_sq_estimate(*pair, *sizes), keep, batch)
            variance = variance.add(variance_estimate(*pair, *sizes), keep, batch)
            losses, fresh = losses.add(loss, keep, batch) if math.isfinite(loss) else losses, fresh + 1
        if math.isfinite(loss):
            trend = trend.add(batch, loss)
        if math.isfinite(found.product):
            age = product.count  # value i of k counts i/k: what came right after the change is forgotten
            product = product.add(found.product, age / (age + 1))
        return Noise(grad_sq=grad_sq, variance=variance, loss=losses, fresh=fresh, product=product, trend=trend)

    def on_new_stage(self) -> "Noise":
        """Return the statistics without what depends on batch and learning rate."""
        return replace(self, fresh=0, product=Mean(), trend=Trend())

    @property
    def scale(self) -> float:
        """Return B_simple = tr Σ/|∇f|², samples: a ratio of means; inf if |∇f|² is lost in noise, NaN until known."""
        gradient_sq = self.grad_sq.value
        return gradient_sq if math.isnan(gradient_sq) else noise_scale(self.variance.value, gradient_sq)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the statistics of plain numbers."""
        parts = {name: Mean(**part) for name, part in values.items() if name not in ("fresh", "trend")}
        return cls(**parts, fresh=values["fresh"], trend=Trend(**values["trend"]))
