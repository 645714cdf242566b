"""Growth in stages in closed form: bound, floor, SFO and serial steps against the best constant; knows no schedule.

Stage m = 0 … M − 1 has batch b₀δ^m, learning rate η₀γ^m and T₀τ^m updates, the family of Umeda & Iiduka (arXiv
2508.05297): δ `growth`, γ `lr_factor`, τ `steps_factor`. Other symbols and units are those of sgd.py.
"""

import math
from dataclasses import dataclass

import numpy as np

from distgrow.theory.numbers import Array, Number, check_growth, check_positive, over, plain
from distgrow.theory.sgd import Constants, optimal_sample_ratio, optimal_steps_ratio


def geometric_sum(ratio: float, count: Number) -> Number:
    """Return 1 + ratio + … + ratio^(count − 1) for `count` ≥ 0. Return the limit, or inf, for an infinite count.

    Source: elementary.
    """
    check_positive(ratio=ratio)
    if ratio == 1.0:
        return plain(count)
    with np.errstate(over="ignore"):
        return plain(np.expm1(count * math.log(ratio)) / (ratio - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """Hold a staged schedule that never ends and whose sizes are not rounded.

    Source: Umeda & Iiduka, arXiv 2508.05297.
    """

    batch: float
    """b₀, samples."""
    lr: float
    """η₀."""
    steps: float
    """T₀, updates."""
    growth: float = 2.0
    lr_factor: float = 1.0
    steps_factor: float = 1.0

    def __post_init__(self) -> None:
        check_positive(batch=self.batch, lr=self.lr, steps=self.steps)
        check_growth(self.growth, self.lr_factor, self.steps_factor)

    def updates(self, stages: Number) -> Number:
        """Return T₀ Σ τ^m, serial steps of the first M stages."""
        return self.steps * geometric_sum(self.steps_factor, stages)

    def sfo(self, stages: Number) -> Number:
        """Return T₀b₀ Σ (τδ)^m, gradient evaluations of the first M stages."""
        return self.steps * self.batch * geometric_sum(self.steps_factor * self.growth, stages)

    def bound(self, constants: Constants, stages: Number) -> Number:
        """Return sgd.bound after M stages in closed form, gradient². Return inf if η₀γ^(M−1) ≥ 2/L."""
        lr_sum = self.lr * self.steps * geometric_sum(self.steps_factor * self.lr_factor, stages)
        noise_ratio = self.steps_factor * self.lr_factor**2 / self.growth
        noise = self.lr**2 * self.steps / self.batch * geometric_sum(noise_ratio, stages)
        with np.errstate(over="ignore"):
            largest = self.lr * np.maximum(1.0, np.power(float(self.lr_factor), stages - 1))
        margin = (2 - constants.smoothness * largest) * lr_sum
        return plain(over(2 * constants.gap + constants.smoothness * constants.variance * noise, margin))

    def floor(self, constants: Constants) -> float:
        """Return the limit of the bound over ever more stages, for γ ≤ δ, gradient². Return 0 if there is no floor.

        There is one if Σ η is finite (τγ < 1, as with constant epochs, τ = 1/δ), and under linear scaling (γ = δ:
        Lσ²η₀/b₀ over 2 − Lη). For γ > 1 the learning rate is bound to reach 2/L: 2 then replaces 2 − Lη, so that the
        bound of every number of stages is above the floor.

        Raises:
            ValueError: γ > δ.

        Source: derived for this project.
        """
        if self.lr_factor > self.growth:
            raise ValueError(f"lr_factor={self.lr_factor} must not be above growth={self.growth}: η/b would grow")
        margin = 2 - constants.smoothness * self.lr if self.lr_factor <= 1 else 2.0
        noise = constants.smoothness * constants.variance * self.lr / self.batch
        kept = self.steps_factor * self.lr_factor
        if kept >= 1:
            return over(noise, margin) if self.lr_factor == self.growth else 0.0
        noise_share = (1 - kept) / (1 - kept * self.lr_factor / self.growth)
        return over(2 * constants.gap * (1 - kept) / (self.lr * self.steps) + noise * noise_share, margin)


# ── optimal stage lengths ───────────────────────────────────────────────────────────────────────────────────────


def optimal_stage_shares(growth: float, lr_factor: float, stages: int) -> Array:
    """Return the shares of M stages in the budget in samples (or epochs), ∝ (δ/γ)^(2m); they sum to 1.

    Source: derived for this project.
    """
    check_positive(stages=stages)
    powers = np.arange(stages - 1, -1, -1.0)  # from the last stage back, so that no power overflows
    ratio = optimal_sample_ratio(growth, lr_factor)
    weights = ratio**-powers if ratio >= 1 else ratio ** powers[::-1]
    return weights / weights.sum()


def optimal_staged(
    constants: Constants, lr: float, epsilon: float, growth: float, lr_factor: float, stages: int
) -> Staged:
    """Return the `Staged` whose M stages of optimal lengths bring the bound to ε² at the least SFO.

    T₀ = 4Δ / ((2 − Lη_max) ε² η₀ Σ q^m) and b₀ = MLσ²T₀η₀²/(2Δ), q = τγ: gap and noise weigh the same.

    Source: derived for this project.
    """
    check_positive(epsilon=epsilon, stages=stages)
    steps_factor = optimal_steps_ratio(growth, lr_factor)
    largest = lr * max(1.0, lr_factor ** (stages - 1))
    half_c1 = constants.c1(largest) * largest / 2  # Δ/(2 − Lη_max); an unstable η_max is refused
    steps = 4 * half_c1 / (epsilon**2 * lr * geometric_sum(steps_factor * lr_factor, float(stages)))
    batch = stages * constants.smoothness * constants.variance * steps * lr**2 / (2 * constants.gap)
    factors = {"growth": growth, "lr_factor": lr_factor, "steps_factor": steps_factor}
    return Staged(batch=batch, lr=lr, steps=steps, **factors)


# ── against the best constant batch for the same, known ε ───────────────────────────────────────────────────────


def sfo_ratio(growth: float, lr_factor: float, stages: Number) -> Number:
    """Return R = M·(q−1)/(q+1)·(q^M+1)/(q^M−1) ≥ 1, q = τγ = δ/γ: SFO of M optimal stages over N*.

    `stages` may be an array. 2 − Lη_max is taken to be the same for both, which holds if Lη ≪ 2.

    Source: derived for this project.
    """
    check_growth(growth, lr_factor)
    check_positive(stages=stages)
    half_log = abs(math.log(growth / lr_factor)) / 2
    if half_log == 0:
        return plain(stages / stages)
    return plain(stages * math.tanh(half_log) / np.tanh(half_log * stages))


def serial_ratio(growth: float, lr_factor: float, stages: Number, constant_lr: float = 1.0) -> Number:
    """Return serial steps of M optimal stages over T* of the best constant batch at η = `constant_lr`·η₀.

    It is Σ τ^m / Σ q^m · η/η₀; for τ = 1 M(q−1)/(q^M−1) · η/η₀. Against a constant that may use the largest learning
    rate of the stages, η₀γ^(M−1), it is at least 1: within the bound growth saves serial steps only by a larger η.

    Source: derived for this project.
    """
    check_growth(growth, lr_factor)
    check_positive(stages=stages, constant_lr=constant_lr)
    steps_factor = optimal_steps_ratio(growth, lr_factor)
    above, below, shared = steps_factor, steps_factor * lr_factor, 1.0
    if min(above, below) > 1:  # summed from the last stage on, or both would be beyond all numbers
        above, below, shared = 1 / above, 1 / below, np.power(float(lr_factor), 1.0 - stages)
    return plain(constant_lr * shared * geometric_sum(above, stages) / geometric_sum(below, stages))


# ── rules of policies ───────────────────────────────────────────────────────────────────────────────────────────


def published_threshold(first: float, batch_ratio: Number) -> Number:
    """Return ε_m = ε₀√(b₀/b_m), the ‖∇f‖ at which stage m ends; `batch_ratio` = b_m/b₀.

    Source: Umeda & Iiduka, arXiv 2508.05302.
    """
    check_positive(first=first, batch_ratio=batch_ratio)
    return plain(first / batch_ratio**0.5)


def critical_threshold(first: float, growth: float, lr_factor: float, stage: Number) -> Number:
    """Return ε_m = ε₀(γ/δ)^(m/2), the ‖∇f‖ for which b_m is as critical as b₀ was for ε₀, if Lη ≪ 2.

    Source: derived for this project.
    """
    check_growth(growth, lr_factor)
    check_positive(first=first)
    return plain(first * (lr_factor / growth) ** (stage / 2))


def seesaw(decay: float) -> tuple[float, float]:
    """Return factors of (η, b) at the point of a schedule that divides η by α: (1/√α, α).

    η/√b, the temperature of Adam and of normalised SGD, falls by α as it would have with b kept.

    Source: Seesaw, arXiv 2510.14717.
    """
    _check_decay(decay)
    return decay**-0.5, decay


def increase(decay: float) -> tuple[float, float]:
    """Return factors of (η, b) at the point of a schedule that divides η by α: (1, α).

    η/b, SGD's temperature, falls by α as it would have with b kept.

    Source: Smith et al. 2017, arXiv 1711.00489; Devarakonda et al. 2017 (AdaBatch), arXiv 1712.02029.
    """
    _check_decay(decay)
    return 1.0, decay


def _check_decay(decay: float) -> None:
    if not decay > 1:
        raise ValueError(f"decay={decay} must be above 1: what the schedule divides the learning rate by")
