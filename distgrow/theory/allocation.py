"""The best spread of gradient evaluations over updates, and what it saves near a minimum; knows no schedule.

It follows from minimising Σ b_t under a limit on Σ w_t/b_t. Batches are real numbers of samples; w_t is the weight at
the end of the noise of update t. Under the Polyak-Łojasiewicz condition |∇f|² ≥ 2μ(f − f*) the error e = f − f* obeys
e_(t+1) ≤ ρe_t + c/b_t. Other symbols are those of sgd.py.
"""

import math
from collections.abc import Sequence

import numpy as np

from distgrow.theory.numbers import Array, Number, check_positive, plain


def best_batches(weights: Sequence[float] | Array, noise: float) -> Array:
    """Return b_t = √w_t·(Σ√w)/V, the batches of least Σ b with Σ w/b = V = `noise`; proportional to √w.

    Source: derived for this project.
    """
    roots = _roots(weights)
    check_positive(noise=noise)
    return roots * (roots.sum() / noise)


def least_samples(weights: Sequence[float] | Array, noise: float) -> float:
    """Return N = (Σ√w)²/V, gradient evaluations of `best_batches`.

    Source: derived for this project.
    """
    check_positive(noise=noise)
    return float(_roots(weights).sum() ** 2 / noise)


def saving(weights: Sequence[float] | Array) -> float:
    """Return T·Σw/(Σ√w)² ≥ 1: SFO of the constant batch over `best_batches`, at equal updates T and equal noise.

    Source: derived for this project.
    """
    roots = _roots(weights)
    return float(len(roots) * (roots**2).sum() / roots.sum() ** 2)


def _roots(weights: Sequence[float] | Array) -> Array:
    if not len(weights):
        raise ValueError("weights must hold one weight for each update; got none")
    check_positive(weights=weights)
    return np.sqrt(np.asarray(weights, float))


# ── under the Polyak-Łojasiewicz condition |∇f|² ≥ 2μ(f − f*): e_{t+1} ≤ ρe_t + c/b_t, e = f − f* ───────────────


def pl_rate(lr: float, mu: float, smoothness: float) -> float:
    """Return ρ = 1 − ημ, the factor of f − f* at each update without noise.

    Raises:
        ValueError: η > 1/L or μ > L.

    Source: derived for this project.
    """
    check_positive(lr=lr, mu=mu, smoothness=smoothness)
    if not lr * smoothness <= 1:
        raise ValueError(f"lr={lr} must be at most 1/L={1 / smoothness:.6g} for the rate 1 − ημ")
    if not mu <= smoothness:
        raise ValueError(f"mu={mu} must be at most smoothness={smoothness}")
    return 1 - lr * mu


def pl_noise(lr: float, smoothness: float, variance: float) -> float:
    """Return c = Lη²σ²/2, loss × samples: an update's noise adds at most c/b to f − f*.

    Source: derived for this project.
    """
    check_positive(lr=lr, smoothness=smoothness, variance=variance)
    return smoothness * lr**2 * variance / 2


def pl_weights(rate: float, updates: int) -> Array:
    """Return w_t = ρ^(T−1−t), the part that is left at the end of the noise of update t.

    Source: derived for this project.
    """
    _check_rate(rate)
    check_positive(updates=updates)
    return rate ** np.arange(updates - 1, -1, -1.0)


def pl_error(start: float, rate: float, noise: float, batches: Sequence[float] | Array) -> float:
    """Return e_T = ρ^T e₀ + c Σ ρ^(T−1−t)/b_t, the bound of f − f* after an update with each of `batches`, loss.

    Source: derived for this project.
    """
    check_positive(start=start, noise=noise, batches=batches)
    weights = pl_weights(rate, len(batches))
    return float(rate ** len(batches) * start + noise * (weights / np.asarray(batches, float)).sum())


def pl_batch_factor(rate: float) -> float:
    """Return ρ^(−½), the best batch's factor from update to update: b_t ∝ ρ^(−t/2).

    Source: derived for this project.
    """
    _check_rate(rate)
    return rate**-0.5


def pl_saving(rate: float, updates: int) -> float:
    """Return T·(1−r)/(1+r)·(1+r^T)/(1−r^T), r = √ρ: `saving` of growth by ρ^(−t/2) over T updates, exactly.

    Source: derived for this project.
    """
    _check_rate(rate)
    check_positive(updates=updates)
    quarter = -math.log(rate) / 4
    return updates * math.tanh(quarter) / math.tanh(quarter * updates)


def pl_saving_limit(depth: Number) -> Number:
    """Return (x/4)·coth(x/4), `pl_saving` of many small steps; x = T ln(1/ρ), the e-folds by which f − f* falls.

    Source: derived for this project.
    """
    check_positive(depth=depth)
    return plain(depth / 4 / np.tanh(depth / 4))


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate} must lie between 0 and 1: the factor of f − f* at each update")
