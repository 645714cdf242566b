"""The best constant batch of SGD on a strongly convex finite sum, sampled τ-nice, as plain arithmetic.

f is the mean of n samples' f_i, a batch a uniformly drawn subset of τ of them. L (`smoothness`) of f, L_max
(`largest_smoothness`) of any f_i, μ (`mu`): loss / parameter²; h̄ (`optimum_sq`), mean ‖∇f_i(x*)‖²; ε (`epsilon`),
target of E‖x − x*‖², parameter². The paper: Adaptive Learning of the Optimal Batch Size of SGD.
"""

import math
from dataclasses import dataclass

import numpy as np

from distgrow.theory.numbers import Number, check_positive, plain


@dataclass(frozen=True, slots=True, kw_only=True)
class FiniteSum:
    """Hold the constants of a finite sum. L ≤ L_max ≤ nL must hold, up to rounding, as it does for convex f_i.

    Source: Alfarra et al. 2020, arXiv 2005.01097.
    """

    samples: int
    smoothness: float
    largest_smoothness: float
    mu: float
    optimum_sq: float

    def __post_init__(self) -> None:
        check_positive(smoothness=self.smoothness, mu=self.mu)
        if self.samples < 2:
            raise ValueError(f"samples={self.samples} must be at least 2 for a batch to choose")
        most = self.samples * self.smoothness
        if not self.smoothness * (1 - 1e-9) <= self.largest_smoothness <= most * (1 + 1e-9):
            raise ValueError(
                f"largest_smoothness={self.largest_smoothness} must lie between smoothness={self.smoothness} and "
                f"samples · smoothness={most}"
            )
        if not self.optimum_sq >= 0:
            raise ValueError(f"optimum_sq={self.optimum_sq} must be at least 0")

    def expected_smoothness(self, batch: Number) -> Number:
        """Return L(τ) = [n(τ−1)L + (n−τ)L_max] / (τ(n−1)): E‖∇f_S(x) − ∇f_S(x*)‖² ≤ 2L(τ)(f(x) − f*)."""
        n, full, one = self.samples, self.smoothness, self.largest_smoothness
        return (n * (batch - 1) * full + (n - batch) * one) / (batch * (n - 1))

    def optimum_noise(self, batch: Number) -> Number:
        """Return σ(τ) = (n−τ)h̄ / (τ(n−1)) = E‖∇f_S(x*)‖², gradient²."""
        return (self.samples - batch) * self.optimum_sq / (batch * (self.samples - 1))

    def complexity(self, batch: Number, epsilon: float) -> Number:
        """Return τ·max{L(τ), 2σ(τ)/(εμ)}: gradient evaluations to ε, up to a factor that does not depend on τ."""
        check_positive(batch=batch, epsilon=epsilon)
        noise = 2 * self.optimum_noise(batch) / (epsilon * self.mu)
        return plain(batch * np.maximum(self.expected_smoothness(batch), noise))

    def lr(self, batch: float, epsilon: float) -> float:
        """Return η = ½ min{1/L(τ), εμ/(2σ(τ))}, the learning rate that reaches ε."""
        check_positive(batch=batch, epsilon=epsilon)
        noise = 2 * self.optimum_noise(batch) / (epsilon * self.mu)
        return 1 / (2 * max(self.expected_smoothness(batch), noise))

    def best_batch(self, epsilon: float) -> float:
        """Return τ* = n(κ − (L_max − L))/(κ + nL − L_max), κ = 2h̄/(εμ), samples. Return 1 if κ ≤ L_max.

        At τ* the two arguments of `complexity` are equal: one rises along τ, the other falls.
        """
        check_positive(epsilon=epsilon)
        n, full, one = self.samples, self.smoothness, self.largest_smoothness
        kappa = 2 * self.optimum_sq / (epsilon * self.mu)
        return n * (kappa - (one - full)) / (kappa + n * full - one) if kappa > one else 1.0

    def best_whole_batch(self, epsilon: float) -> int:
        """Return the whole number of samples of least complexity: one of the two beside `best_batch`."""
        best = self.best_batch(epsilon)
        whole = {math.floor(best), min(self.samples, math.ceil(best))}
        return min(sorted(whole), key=lambda batch: self.complexity(float(batch), epsilon))
