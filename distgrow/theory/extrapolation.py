"""Stability and bias of gradients at a shifted point, as plain arithmetic; knows no engine.

SGD without momentum steps from θ with the gradient at θ − γ̂·s: `fresh`, s is the gradient of the same batch at θ;
`past`, s is the gradient of the update before. Symbols: η (`lr`); γ̂ (`rate`), in units of η; λ (`curvature`) of a
quadratic, at most L (`smoothness`), loss / parameter²; h = ηλ, ĥ = γ̂λ. The formulas were derived for this project,
after Lin et al. 2020 (arXiv 2006.05720), and are held against simulation by their tests.
"""

import math

from distgrow.theory.numbers import check_positive


def fresh_factor(lr: float, rate: float, curvature: float) -> float:
    """Return 1 − h(1 − ĥ), by which an update with a fresh shift multiplies the error on a quadratic.

    Source: derived for this project, after Lin et al. 2020, arXiv 2006.05720.
    """
    check_positive(curvature=curvature)
    return 1 - lr * curvature * (1 - rate * curvature)


def fresh_stability_limit(rate: float, smoothness: float) -> float:
    """Return the η below which fresh shifts are stable on all curvatures up to L; 0 from γ̂L = 1 on.

    2/(L(1 − γ̂L)) for γ̂L up to ½, then 8γ̂: below 8/L, and twice SGD's 2/L at γ̂L = ½, for twice the evaluations.

    Source: derived for this project, after Lin et al. 2020, arXiv 2006.05720.
    """
    check_positive(smoothness=smoothness)
    relative = rate * smoothness
    if relative >= 1:
        return 0.0
    return 2 / (smoothness * (1 - relative)) if relative <= 0.5 else 8 * rate


def past_stability_limit(rate: float, smoothness: float) -> float:
    """Return 2/L − 2γ̂, the η below which past shifts are stable on all curvatures up to L; 0 if none is.

    A past shift makes the limit smaller: 2/(3L) at γ̂ = η.

    Source: derived for this project, after Lin et al. 2020, arXiv 2006.05720.
    """
    check_positive(smoothness=smoothness)
    return max(0.0, 2 / smoothness - 2 * rate)


def past_rate(lr: float, rate: float, curvature: float) -> float:
    """Return the factor by which updates with a past shift shrink the error on a quadratic in the long run.

    It is the largest root, in absolute value, of z² − (1 − h − ĥ)z − ĥ.

    Source: derived for this project, after Lin et al. 2020, arXiv 2006.05720.
    """
    check_positive(curvature=curvature)
    middle, last = 1 - lr * curvature - rate * curvature, rate * curvature
    return (abs(middle) + math.sqrt(middle**2 + 4 * last)) / 2


def gradient_penalty(lr: float, rate: float) -> float:
    """Return c = η/4 − γ̂/2: to second order, updates with a shift by gradients descend on f + c‖∇f‖².

    SGD's own c is η/4. γ̂ = η/2 makes it 0: the midpoint rule. Larger γ̂ rewards large gradients, the opposite of
    sharpness-aware minimisation.

    Source: derived for this project, after Lin et al. 2020, arXiv 2006.05720.
    """
    return lr / 4 - rate / 2


def shift_variance(rate: float, variance: float, batch: float) -> float:
    """Return γ̂²·tr Σ/b, parameter²: the mean square of what noise adds to a shift by a gradient over b samples.

    Source: derived for this project, after Lin et al. 2020, arXiv 2006.05720.
    """
    check_positive(variance=variance, batch=batch)
    return rate**2 * variance / batch
