"""Bounds, critical batch size and optimal stage lengths: plain numbers in, plain numbers out; knows no schedule.

Symbols (Umeda & Iiduka, arXiv 2508.05297): Δ = f(θ₀) − f*, loss units (`gap`); L, smoothness, loss / parameter²
(`smoothness`); σ² = tr Σ of one sample's gradient noise (`variance`); ε, target of ‖∇f‖ (`epsilon`); η, learning
rate (`lr`); b, batch, samples. SFO is the number of per-sample gradient evaluations.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What the bound needs to know of a problem; all positive, units as above."""

    smoothness: float
    variance: float
    gap: float

    def stable_lr(self) -> float:
        """2/L, the learning rate that no stage may reach."""
        return 2 / self.smoothness

    def c1(self, lr: float) -> float:
        """C₁ = 2Δ / ((2 − Lη)η)."""
        return 2 * self.gap / ((2 - self._checked(lr)) * lr)

    def c2(self, lr: float) -> float:
        """C₂ = Lησ² / (2 − Lη)."""
        return self.smoothness * lr * self.variance / (2 - self._checked(lr))

    def _checked(self, lr: float) -> float:
        if not 0 < lr < self.stable_lr():
            raise ValueError(f"lr={lr} must lie between 0 and 2/L={self.stable_lr():.6g}")
        return self.smoothness * lr


def bound(constants: Constants, steps: Iterable[tuple[int, float, int]]) -> float:
    """Upper bound of min_t E‖∇f(θ_t)‖² after (updates, lr, batch) runs in order.

    [2Δ + Lσ² Σ η²/b] / [(2 − L·η_max) Σ η]; inf while η_max ≥ 2/L or before the first update.
    """
    lr_sum = noise = lr_max = 0.0
    for count, lr, batch in steps:
        lr_sum, noise, lr_max = lr_sum + count * lr, noise + count * lr * lr / batch, max(lr_max, lr)
    margin = (2 - constants.smoothness * lr_max) * lr_sum
    return (2 * constants.gap + constants.smoothness * constants.variance * noise) / margin if margin > 0 else math.inf


def steps_to(constants: Constants, lr: float, batch: float, epsilon: float) -> float:
    """T(b) = C₁b / (ε²b − C₂), updates at constant batch until the bound is ε²; inf where it never is."""
    margin = epsilon**2 * batch - constants.c2(lr)
    return constants.c1(lr) * batch / margin if margin > 0 else math.inf


def sfo_to(constants: Constants, lr: float, batch: float, epsilon: float) -> float:
    """N(b) = b·T(b), gradient evaluations at constant batch until the bound is ε²; convex in b."""
    return batch * steps_to(constants, lr, batch, epsilon)


def critical_batch(constants: Constants, lr: float, epsilon: float) -> float:
    """b* = 2C₂/ε², the batch at which N(b) is least, samples."""
    return 2 * constants.c2(lr) / epsilon**2


def least_sfo(constants: Constants, lr: float, epsilon: float) -> float:
    """N* = 4C₁C₂/ε⁴ = N(b*), gradient evaluations."""
    return 4 * constants.c1(lr) * constants.c2(lr) / epsilon**4


def cost_of_wrong_batch(ratio: float) -> float:
    """N(b)/N* = x²/(2x − 1) at x = b/b*; inf for x ≤ ½."""
    return ratio**2 / (2 * ratio - 1) if ratio > 0.5 else math.inf


def exponent(growth: float, lr_factor: float, steps_factor: float) -> float:
    """p of N ~ ε^(−p) when batch, learning rate and steps per stage grow by δ, γ and τ.

    2 ln(τδ)/ln(τγ) if τγ² ≤ δ, else 2 ln(τδ)/ln(δ/γ); at least 4, with equality iff δ = τγ². inf where the bound
    has a floor (the logarithm is not positive).
    """
    below = steps_factor * lr_factor**2 <= growth
    slowest = steps_factor * lr_factor if below else growth / lr_factor
    return 2 * math.log(steps_factor * growth) / math.log(slowest) if slowest > 1 else math.inf


def optimal_steps_ratio(growth: float, lr_factor: float) -> float:
    """τ = δ/γ²: steps of a stage over those of the one before, where `exponent` is least."""
    return growth / lr_factor**2


def optimal_sample_ratio(growth: float, lr_factor: float) -> float:
    """τδ = (δ/γ)²: samples (and epochs) of a stage over those of the one before, where `exponent` is least."""
    return (growth / lr_factor) ** 2
