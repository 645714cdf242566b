"""The functional scaling law: the loss that a schedule of (η, b) leads to; plain arithmetic, knows no run.

loss = L∞ + A·T^−s + c Σ_τ K(T − T_τ)·η_τ²/b_τ, T = Σ η the intrinsic time, K(t) = (t/u + 1)^−k the memory of noise.
Symbols: L∞ (`floor`), the least loss; A (`scale`) and s (`power`) of the fall; c (`noise`), of the noise that an update
brings in; k (`decay`) = 2 − 1/β, between 1 and 2; u (`unit`), the intrinsic time in which noise begins to fade. A
schedule is a sequence of parts (updates, η, b), as in sgd.bound. Two additions: noise may fall with the loss, which
puts L∞ + A·T_τ^−s into the sum; and steps whose length gradients do not decide, as Adam's, have η·√(b/(b + B)) for η.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from distgrow.theory.numbers import Array, check_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """Hold a schedule as columns: its parts of equal updates.

    Source: elementary.
    """

    updates: Array
    rates: Array
    batches: Array

    @property
    def times(self) -> Array:
        """Return T after each part."""
        return np.cumsum(self.updates * self.rates)

    @property
    def samples(self) -> Array:
        """Return the samples by the end of each part."""
        return np.cumsum(self.updates * self.batches)

    def normalised(self, balance: float) -> "Course":
        """Return the course with η·√(b/(b + B)) for η: a step along g/√E|g|² goes so far along the mean gradient.

        Args:
            balance: B, the batch at which noise is as large as the gradient. 0: the course as it is.

        Source: derived for this project, with E|g|² = |∇f|²·(1 + B/b).
        """
        return replace(self, rates=self.rates * np.sqrt(self.batches / (self.batches + balance)))


def course(parts: Iterable[tuple[float, float, float]]) -> Course:
    """Return a schedule of parts (updates, η, b) as columns. An η of 0 moves nothing and is left out.

    Source: elementary.
    """
    moving = [(updates, lr, batch) for updates, lr, batch in parts if lr > 0]
    if not moving:
        raise ValueError("a schedule needs an update with a learning rate above 0")
    updates, rates, batches = np.asarray(moving, float).T
    check_positive(updates=updates, batches=batches)
    return Course(updates=updates, rates=rates, batches=batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Hold the numbers of the law.

    Source: after the functional scaling law of arXiv 2602.14208; u, B and noise that falls are added for this project.
    """

    floor: float
    scale: float
    power: float
    noise: float
    decay: float = 1.5
    unit: float = 1.0
    falling: float | None = None  #: T from which on noise falls with the loss; it is even before. None: it never falls
    balance: float = 0.0  #: B of Course.normalised

    def loss(self, schedule: Course, ends: Sequence[int] | Array | None = None) -> Array:
        """Return the loss after each of the parts `ends`, by default after the last alone."""
        at = np.asarray([len(schedule.updates) - 1] if ends is None else ends, int)
        own = schedule.normalised(self.balance) if self.balance else schedule
        weights = 1.0 if self.falling is None else self.quiet(np.maximum(own.times, self.falling))
        return self.quiet(own.times[at]) + self.noise * memory(own, at, self.decay, self.unit, weights)

    def quiet(self, times: Array) -> Array:
        """Return the loss without noise at each of the intrinsic times."""
        return self.floor + self.scale * times**-self.power


def memory(
    schedule: Course, ends: Sequence[int] | Array, decay: float, unit: float = 1.0, weights: Array | float = 1.0
) -> Array:
    """Return Σ_τ K(T − T_τ)·w_τ·η_τ²/b_τ after each of the parts `ends`, w the `weights` of the parts.

    The sum over a part is its integral with the first three terms of Euler and Maclaurin: within 1 % of the sum if
    no η is above u, and exact for parts of one update.

    Source: after the functional scaling law of arXiv 2602.14208; the summation is derived for this project.
    """
    check_positive(unit=unit)
    if decay <= 1:
        raise ValueError(f"decay={decay} must be above 1: else noise is never forgotten")
    times, at = schedule.times, np.asarray(ends, int)
    nearest = np.maximum(times[at][:, None] - times, 0.0)  # to each part's last update
    gaps = (schedule.updates - 1) * schedule.rates
    near, far = 1 + nearest / unit, 1 + (nearest + gaps) / unit
    one, other = near**-decay, far**-decay
    integral = unit / (schedule.rates * (decay - 1)) * (near * one - far * other)
    slope = decay * schedule.rates / unit * (one / near - other / far)
    sums = np.where(schedule.updates > 1, integral + (one + other) / 2 + slope / 12, one)
    past = np.arange(len(times)) <= at[:, None]
    return np.sum(np.where(past, sums * weights * schedule.rates**2 / schedule.batches, 0.0), axis=1)


def settled_noise(lr: float, batch: float, noise: float, decay: float, unit: float) -> float:
    """Return c·η/b·u/(k − 1), the loss that noise keeps up in the long run at constant η and b; η well below u.

    Source: derived for this project.
    """
    check_positive(batch=batch, unit=unit)
    return noise * lr / batch * unit / (decay - 1)
