"""The last iterate's loss, and the batches that are best for a shape of η; plain arithmetic, knows no schedule.

Symbols: η_t, learning rate of update t; b_t, its batch, samples; S_t = η_t + η_(t+1) + …, the rates still to come; A =
S_0; σ² (`variance`), gradient²; N, samples of the run; z (`share`), the share of N that is spent; φ, η over its first
value; h (`hold`), the share of N from which on the temperature η/b falls. Formulas that were derived for this project
are held against brute force by their tests.
"""

import math
from collections.abc import Sequence

import numpy as np

from distgrow.theory.numbers import Array, check_positive


def rates_to_come(rates: Sequence[float] | Array) -> Array:
    """Return S_t of every update.

    Source: elementary.
    """
    check_positive(rates=rates)
    return np.cumsum(np.asarray(rates, float)[::-1])[::-1]


def loss_bound(
    distance_sq: float, variance: float, rates: Sequence[float] | Array, batches: Sequence[float] | Array
) -> float:
    """Return ‖θ₀ − θ*‖²/(2A) + ½ Σ η_t²σ²/(b_t S_t), the bound of E f(θ) − f* after the last update; f is convex.

    Source: derived for this project, after arXiv 2607.27731.
    """
    return distance_sq / (2 * float(np.sum(rates))) + noise_term(variance, rates, batches)


def noise_term(variance: float, rates: Sequence[float] | Array, batches: Sequence[float] | Array) -> float:
    """Return ½ Σ η_t²σ²/(b_t S_t), the part of `loss_bound` that batches decide.

    Source: derived for this project, after arXiv 2607.27731.
    """
    check_positive(batches=batches)
    weights = np.asarray(rates, float) ** 2 / rates_to_come(rates)
    return float(variance / 2 * np.sum(weights / np.asarray(batches, float)))


def best_batches(rates: Sequence[float] | Array, samples: float) -> Array:
    """Return b_t = N·w_t/Σ w, w_t = η_t/√S_t: the least `noise_term` of all batches that add up to N.

    It is then ½σ²(Σ w)²/N, which is at most 2σ²A/N, and close to it with many updates, whatever the shape of η.

    Source: derived for this project.
    """
    check_positive(samples=samples)
    weights = np.asarray(rates, float) / np.sqrt(rates_to_come(rates))
    return samples * weights / np.sum(weights)


def line(share: float, hold: float = 0.0) -> float:
    """Return the temperature η/b over its first value: 1 up to h, then (1 − z)/(1 − h).

    It is what `best_batches` come to with many updates: d√S/dz is constant, and η/b ∝ √S.

    Source: derived for this project.
    """
    return min(1.0, (1 - share) / (1 - hold))


def share_at(level: float, hold: float = 0.0) -> float:
    """Return z at which `line` has fallen to `level`.

    Source: derived for this project.
    """
    return hold + (1 - hold) * (1 - level)


def matched_growth(share: float, fall: float = 1.0, hold: float = 0.0) -> float:
    """Return b/b₀ = φ/`line` at z < 1, φ = `fall`: 1/(1 − z) for constant η, 1 for a linear decay to 0.

    Source: derived for this project.
    """
    return fall / line(share, hold)


def matched_steps(most: float = math.inf) -> float:
    """Return the updates over those at b₀ throughout, for constant η and b/b₀ ≤ `most`: (1 + 1/most²)/2.

    Beyond `most`, η falls along the line.

    Source: derived for this project.
    """
    if not most >= 1:
        raise ValueError(f"most={most} must be at least 1: the largest batch over the first")
    return (1 + most**-2) / 2


def decay_in_samples(decay: float) -> float:
    """Return d = √(q/(2 − q)), the share of the samples of a linear decay over the last share q = `decay` of updates.

    This is for batches matched to that decay. They grow up to b/b₀ = 1/d.

    Source: derived for this project.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay} must lie above 0 and be at most 1: a share of the updates")
    return math.sqrt(decay / (2 - decay))
