"""The bound of SGD, the critical batch size and SFO complexity, as plain arithmetic; knows no schedule.

Symbols: Δ = f(θ₀) − f*, loss (`gap`); L, smoothness, loss / parameter² (`smoothness`); σ² = tr Σ, the variance of one
sample's gradient, gradient² (`variance`); ε, target of ‖∇f‖, gradient (`epsilon`); η, learning rate (`lr`); b, batch,
samples (`batch`). SFO is the number of gradient evaluations of one sample. If a batch is an array, so is the result.
Formulas that were derived for this project are held against brute force by their tests.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from distgrow.theory.numbers import Array, Number, check_growth, check_positive, over


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Hold the constants of a problem: L, σ² and Δ. All must be positive.

    Source: Umeda & Iiduka, arXiv 2508.05297.
    """

    smoothness: float
    variance: float
    gap: float

    def __post_init__(self) -> None:
        check_positive(smoothness=self.smoothness, variance=self.variance, gap=self.gap)

    def stable_lr(self) -> float:
        """Return 2/L. Every learning rate must be below it."""
        return 2 / self.smoothness

    def c1(self, lr: float) -> float:
        """Return C₁ = 2Δ / ((2 − Lη)η)."""
        return 2 * self.gap / ((2 - self._checked(lr)) * lr)

    def c2(self, lr: float) -> float:
        """Return C₂ = Lησ² / (2 − Lη)."""
        return self.smoothness * lr * self.variance / (2 - self._checked(lr))

    def tradeoff(self, lr: float) -> "Tradeoff":
        """Return SGD's bound of min ‖∇f‖² at a constant (b, η): C₁/T + C₂/b after T updates."""
        return Tradeoff(a=self.c1(lr), b=self.c2(lr))

    def _checked(self, lr: float) -> float:
        if not 0 < lr < self.stable_lr():
            raise ValueError(f"lr={lr} must lie between 0 and 2/L={self.stable_lr():.6g}")
        return self.smoothness * lr


# ── any optimizer whose bound is A/K + B/b + C ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Tradeoff:
    """Hold a bound A/K + B/b + C after K updates at batch b, as SGD, momentum and Adam have it.

    `target` is in the units of what is bounded. For SGD it is ε², a bound of ‖∇f‖². For Adam and momentum it is the ε
    of the paper; their C > 0 comes from the moments, and neither K nor b lowers it.

    Source: Iiduka, arXiv 2208.09814.
    """

    a: float
    b: float
    c: float = 0.0

    def __post_init__(self) -> None:
        check_positive(a=self.a, b=self.b)
        if not self.c >= 0:
            raise ValueError(f"c={self.c} must be at least 0")

    def steps_to(self, batch: Number, target: float) -> Number:
        """Return K(b) = Ab / ((ε − C)b − B), updates. Return inf for b ≤ B/(ε − C)."""
        check_positive(batch=batch)
        return over(self.a * batch, self._room(target) * batch - self.b)

    def sfo_to(self, batch: Number, target: float) -> Number:
        """Return N(b) = b·K(b), gradient evaluations; convex in b."""
        return batch * self.steps_to(batch, target)

    def critical_batch(self, target: float) -> float:
        """Return b* = 2B/(ε − C), the batch at which N(b) is least, samples."""
        return 2 * self.b / self._room(target)

    def least_sfo(self, target: float) -> float:
        """Return N* = N(b*) = 4AB/(ε − C)², gradient evaluations."""
        return 4 * self.a * self.b / self._room(target) ** 2

    def critical_steps(self, target: float) -> float:
        """Return K* = K(b*) = 2A/(ε − C), updates."""
        return 2 * self.a / self._room(target)

    def _room(self, target: float) -> float:
        if not target > self.c:
            raise ValueError(f"target={target} must be above the bound's floor C={self.c}")
        return target - self.c


def measured_tradeoff(batches: Sequence[float], steps: Sequence[float]) -> Tradeoff:
    """Return the bound, with ε − C as its unit, from the updates that runs at constant batches took to one target.

    A, B and C need not be known: 1/K = (ε − C)/A − (B/A)/b is a line in 1/b, and this is its least squares fit. So
    `target` is 1 in all methods of what is returned.

    Args:
        batches: Samples of the runs' batches, two of which differ.
        steps: Updates to the target, of each run.

    Raises:
        ValueError: The updates do not fall as the batch grows, so noise had no part in them.

    Source: derived for this project.
    """
    if len(batches) != len(steps) or len(set(batches)) < 2:
        raise ValueError(f"batches={batches} and steps={steps} must be of one length, with two batches that differ")
    check_positive(batches=batches, steps=steps)
    slope, intercept = np.polyfit(1 / np.asarray(batches, float), 1 / np.asarray(steps, float), 1)
    if not slope < 0:
        raise ValueError(f"steps={steps} show no critical batch: they must fall as batches={batches} grow")
    return Tradeoff(a=float(1 / intercept), b=float(-slope / intercept))


def measured_critical_batch(batches: Sequence[float], steps: Sequence[float]) -> float:
    """Return b*, samples, of `measured_tradeoff`: −2·slope/intercept of its line.

    Source: derived for this project.
    """
    return measured_tradeoff(batches, steps).critical_batch(1.0)


# ── SGD ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def bound(constants: Constants, steps: Iterable[tuple[float, float, float]]) -> float:
    """Return an upper bound of min_t E‖∇f(θ_t)‖² after (updates, lr, batch) runs in order, gradient².

    It is [2Δ + Lσ² Σ η²/b] / [(2 − L·η_max) Σ η]. Return inf if η_max ≥ 2/L, or before the first update.

    Source: Umeda & Iiduka, arXiv 2508.05297.
    """
    along = bounds(constants, steps)
    return float(along[-1]) if len(along) else math.inf


def bounds(constants: Constants, steps: Iterable[tuple[float, float, float]]) -> Array:
    """Return `bound` after each of the (updates, lr, batch) runs: the curve of a schedule.

    Source: Umeda & Iiduka, arXiv 2508.05297.
    """
    count, lr, batch = np.array(list(steps), float).reshape(-1, 3).T
    check_positive(batch=batch)
    if not (np.all(count >= 0) and np.all(lr >= 0)):
        raise ValueError(f"updates={count} and lr={lr} must be at least 0")
    noise = constants.smoothness * constants.variance * np.cumsum(count * lr**2 / batch)
    margin = (2 - constants.smoothness * np.maximum.accumulate(lr)) * np.cumsum(count * lr)
    return over(2 * constants.gap + noise, margin)


def steps_to(constants: Constants, lr: float, batch: Number, epsilon: float) -> Number:
    """Return T(b) = C₁b / (ε²b − C₂), updates at constant batch until the bound is ε². Return inf if b ≤ C₂/ε².

    Source: Umeda & Iiduka, arXiv 2508.05297.
    """
    check_positive(epsilon=epsilon)
    return constants.tradeoff(lr).steps_to(batch, epsilon**2)


def sfo_to(constants: Constants, lr: float, batch: Number, epsilon: float) -> Number:
    """Return N(b) = b·T(b), gradient evaluations at constant batch until the bound is ε²; convex in b.

    Source: Umeda & Iiduka, arXiv 2508.05297.
    """
    return batch * steps_to(constants, lr, batch, epsilon)


def critical_batch(constants: Constants, lr: float, epsilon: float) -> float:
    """Return b* = 2C₂/ε², the batch at which N(b) is least, samples.

    Source: Umeda & Iiduka, arXiv 2508.05297.
    """
    check_positive(epsilon=epsilon)
    return constants.tradeoff(lr).critical_batch(epsilon**2)


def critical_steps(constants: Constants, lr: float, epsilon: float) -> float:
    """Return T* = 2C₁/ε² = T(b*), updates.

    Source: Umeda & Iiduka, arXiv 2508.05297.
    """
    check_positive(epsilon=epsilon)
    return constants.tradeoff(lr).critical_steps(epsilon**2)


def least_sfo(constants: Constants, lr: float, epsilon: float) -> float:
    """Return N* = 4C₁C₂/ε⁴ = N(b*) = 8ΔLσ²/((2 − Lη)²ε⁴), gradient evaluations.

    With η = η_max it is also a lower bound of all schedules with learning rates up to η_max: none has a bound of ε²
    after fewer, and only b_t ∝ η_t reaches it. This part is derived for this project.

    Source: Umeda & Iiduka, arXiv 2508.05297.
    """
    check_positive(epsilon=epsilon)
    return constants.tradeoff(lr).least_sfo(epsilon**2)


def cost_of_wrong_batch(ratio: Number) -> Number:
    """Return N(b)/N* = x²/(2x − 1) at x = b/b* and the same η. Return inf for x ≤ ½.

    Source: derived for this project.
    """
    check_positive(ratio=ratio)
    return over(ratio * ratio, 2 * ratio - 1)


def best_lr(constants: Constants, batch: Number, epsilon: float) -> Number:
    """Return η(b) = ε²b / (L(ε²b + σ²)) < 1/L, the constant learning rate at which N(b) is least.

    Source: derived for this project.
    """
    check_positive(batch=batch, epsilon=epsilon)
    signal = epsilon**2 * batch
    return signal / (constants.smoothness * (signal + constants.variance))


def sfo_at_best_lr(constants: Constants, batch: Number, epsilon: float) -> Number:
    """Return N(b) at `best_lr`: 2ΔL(σ²/ε⁴)·(1 + b/B) gradient evaluations, B = σ²/ε².

    B is the noise scale at the target. Unlike N(b) at one η this has no best batch: it rises along b, gently up to B.
    Updates are N/b.

    Source: derived for this project.
    """
    check_positive(batch=batch, epsilon=epsilon)
    return 2 * constants.gap * constants.smoothness * (batch + constants.variance / epsilon**2) / epsilon**2


def sfo_table(constants: Constants, lrs: Sequence[float], batches: Sequence[float], epsilon: float) -> Array:
    """Return N(b), gradient evaluations, for every pair: (lrs, batches). An entry is inf if ε² is never reached.

    The least entry is the best constant (b, η), the baseline of every growth result.

    Source: Umeda & Iiduka, arXiv 2508.05297.
    """
    columns = np.asarray(batches, float)
    return np.array([sfo_to(constants, lr, columns, epsilon) for lr in lrs]).reshape(len(lrs), len(columns))


# ── staged growth: the exponents (staged.py has the rest) ────────────────────────────────────────────────


def exponent(growth: float, lr_factor: float, steps_factor: float) -> float:
    """Return p of N ~ ε^(−p) if batch, learning rate and steps per stage grow by δ, γ and τ.

    p = 2 ln(τδ)/ln(τγ) if τγ² ≤ δ, else 2 ln(τδ)/ln(δ/γ). It is at least 4, with equality if and only if δ = τγ².
    Return inf if the bound has a floor or falls only along the logarithm of N (the divisor is not positive).

    Source: derived for this project.
    """
    check_growth(growth, lr_factor, steps_factor)
    below = steps_factor * lr_factor**2 <= growth
    slowest = steps_factor * lr_factor if below else growth / lr_factor
    return 2 * math.log(steps_factor * growth) / math.log(slowest) if slowest > 1 else math.inf


def optimal_steps_ratio(growth: float, lr_factor: float) -> float:
    """Return τ = δ/γ², the steps of a stage over those of the one before, at which `exponent` is least.

    Source: derived for this project.
    """
    check_growth(growth, lr_factor)
    return growth / lr_factor**2


def optimal_sample_ratio(growth: float, lr_factor: float) -> float:
    """Return τδ = (δ/γ)², the samples of a stage over those of the one before, at which `exponent` is least.

    Source: derived for this project.
    """
    check_growth(growth, lr_factor)
    return (growth / lr_factor) ** 2
