"""Gradient noise and the batch: estimators, noise scale, critical batch and gains, as plain arithmetic.

Symbols: G, the full gradient; |G|² (`grad_sq`); Σ, covariance of one sample's gradient, tr Σ (`variance`), both in
gradient² units; H, the Hessian: GᵀHG/|G|² (`curvature`) and tr(HΣ)/tr Σ (`noise_curvature`), loss / parameter²; η
(`lr`); b, samples (`batch`). Callers average over steps: numerators and denominators apart, never ratios. Formulas that
were derived for this project are held against exact enumeration or Monte Carlo by their tests.
"""

import math

from distgrow.theory.numbers import check_positive

# ── estimators from two mean gradients of one update (McCandlish et al. 2018) ───────────────────────────────────


def variance_estimate(small_sq: float, large_sq: float, small: float, large: float) -> float:
    """Return tr Σ = (|G_b|² − |G_B|²) / (1/b − 1/B) from mean gradients over b = `small` and B = `large` samples.

    Unbiased with independent samples, the b among the B or not. Without replacement from n samples it is unbiased for
    tr Σ·n/(n − 1), the variance with the divisor n − 1. Single estimates may be negative.

    Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1.
    """
    _check_batches(small, large)
    return (small_sq - large_sq) / (1 / small - 1 / large)


def grad_sq_estimate(
    small_sq: float, large_sq: float, small: float, large: float, population: float = math.inf
) -> float:
    """Return |G|² = (B|G_B|² − b|G_b|²) / (B − b), unbiased with independent samples.

    Single estimates may be negative. Drawn without replacement from n samples (one pass over the data) this is low by
    tr Σ/(n − 1) on average, more than |G|² itself once the noise scale exceeds n. `population` = n adds it back; this
    correction is derived for this project.

    Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1.
    """
    _check_batches(small, large)
    check_positive(population=population)
    if large > population:
        raise ValueError(f"large={large} must be at most population={population}: samples drawn without replacement")
    plain = (large * large_sq - small * small_sq) / (large - small)
    return plain + variance_estimate(small_sq, large_sq, small, large) / population


def batch_variance(variance: float, batch: float, population: float = math.inf) -> float:
    """Return E|G_b − G|², gradient²: σ²/b, times (n − b)/(n − 1) if drawn without replacement from n samples.

    Source: sampling theory (the finite population correction).
    """
    check_positive(batch=batch, population=population)
    if not batch <= population:
        raise ValueError(f"batch={batch} must be at most population={population}: samples drawn without replacement")
    if math.isinf(population):
        return variance / batch
    return variance / batch * (population - batch) / (population - 1) if population > 1 else 0.0


def _check_batches(small: float, large: float) -> None:
    check_positive(small=small)
    if not large > small:
        raise ValueError(f"large={large} must be above small={small}: two gradients of one batch size tell no noise")


# ── noise scale, and what a batch costs by it ───────────────────────────────────────────────────────────────────


def noise_scale(variance: float, grad_sq: float) -> float:
    """Return B_simple = tr Σ/|G|², samples. Return inf if the estimate of |G|² is not positive.

    Source: McCandlish et al. 2018, arXiv 1812.06162, eq. 2.9.
    """
    return variance / grad_sq if grad_sq > 0 else math.inf


def sfo_overhead(batch: float, scale: float) -> float:
    """Return E/E_min = 1 + b/B, gradient evaluations over those of the smallest batches.

    Source: McCandlish et al. 2018, arXiv 1812.06162, section 2.
    """
    check_positive(batch=batch, scale=scale)
    return 1 + batch / scale


def steps_overhead(batch: float, scale: float) -> float:
    """Return S/S_min = 1 + B/b, serial steps over those of the largest batches: (S/S_min − 1)(E/E_min − 1) = 1.

    Source: McCandlish et al. 2018, arXiv 1812.06162, section 2.
    """
    check_positive(batch=batch, scale=scale)
    return 1 + scale / batch


def half_batch(latency: float, rate: float) -> float:
    """Return n½ = a·r, samples: the batch at which half of an update is its fixed part.

    An update of b samples takes a + b/r: a (`latency`) seconds whatever the batch, at r (`rate`) samples a second.

    Source: elementary; after n½ of Hockney & Jesshope 1988 for vector computers.
    """
    if not latency >= 0:
        raise ValueError(f"latency={latency} must be at least 0 seconds")
    check_positive(rate=rate)
    return latency * rate


def fastest_batch(latency: float, rate: float, scale: float) -> float:
    """Return b* = √(n½·B), the batch at which the time to the same loss is least; B is the noise scale.

    An update takes a + b/r and makes the progress 1/(1 + B/b) of one without noise.

    Source: derived for this project, after McCandlish et al. 2018, arXiv 1812.06162.
    """
    check_positive(scale=scale)
    return math.sqrt(half_batch(latency, rate) * scale)


def time_to_progress(batch: float, latency: float, rate: float, scale: float) -> float:
    """Return (a + b/r)(1 + B/b), seconds to the progress of one update without noise.

    It is least at `fastest_batch`: (√a + √(B/r))².

    Source: derived for this project, after McCandlish et al. 2018, arXiv 1812.06162.
    """
    check_positive(batch=batch, rate=rate, scale=scale)
    return (latency + batch / rate) * steps_overhead(batch, scale)


def temperature(lr: float, batch: float, power: float = 1.0) -> float:
    """Return T = η/b^power, power 1 for SGD and ½ for Adam: runs of equal T follow one path in samples.

    Source: derived for this project.
    """
    check_positive(lr=lr, batch=batch)
    return lr / batch**power


# ── critical batch from measurements ────────────────────────────────────────────────────────────────────────────


def critical_batch_now(variance: float, grad_sq: float, lr: float, smoothness: float) -> float:
    """Return b̂* = κ·tr Σ/|G|², samples, κ = 2Lη/(2 − Lη): sgd.critical_batch for ε = |G|.

    Source: derived for this project.
    """
    return directed_critical_batch(variance, grad_sq, lr, smoothness, smoothness)


def directed_critical_batch(
    variance: float, grad_sq: float, lr: float, curvature: float, noise_curvature: float
) -> float:
    """Return b̂* = 2η·tr(HΣ) / (|G|²(2 − η·GᵀHG/|G|²)), the batch of most expected progress per sample.

    Return inf if even the full gradient makes no progress (η·curvature ≥ 2) or |G|² is not positive. If the noise lies
    along negative curvature, the result is 0 or less: any batch makes progress.

    Source: derived for this project.
    """
    check_positive(lr=lr)
    room = grad_sq * (2 - lr * curvature)
    return 2 * lr * noise_curvature * variance / room if room > 0 and grad_sq > 0 else math.inf


def preconditioned_critical_batch(grad_sq_p: float, noise_php: float, lr: float, grad_php: float) -> float:
    """Return b̂* = 2η·tr(PHPΣ) / (2GᵀPG − η·GᵀPHPG), the batch of most expected progress per sample of steps −ηPg.

    With PH ≈ λI it is κ·tr(PΣ)/(GᵀPG), κ = 2ηλ/(2 − ηλ). Return inf if even the full gradient makes no progress.

    Args:
        grad_sq_p: GᵀPG.
        noise_php: tr(PHPΣ).
        lr: η.
        grad_php: GᵀPHPG.

    Source: derived for this project; the critical batch of Adam after Iiduka 2022, arXiv 2208.09814.
    """
    check_positive(lr=lr)
    room = 2 * grad_sq_p - lr * grad_php
    return 2 * lr * noise_php / room if room > 0 else math.inf


def expected_decrease(
    grad_sq: float, variance: float, lr: float, batch: float, curvature: float, noise_curvature: float
) -> float:
    """Return E[f(θ) − f(θ − ηg)] = η|G|² − (η²/2)(GᵀHG + tr(HΣ)/b), loss; exact on quadratics.

    Source: derived for this project.
    """
    check_positive(lr=lr, batch=batch)
    return lr * grad_sq - lr**2 / 2 * (curvature * grad_sq + noise_curvature * variance / batch)


def progress_product(
    grad_sq: float, variance: float, lr: float, batch: float, curvature: float, noise_curvature: float
) -> float:
    """Return E⟨g_t, g_(t+1)⟩ = |G|²(1 − η·GᵀHG/|G|²) − η·tr(HΣ)/b for independent batches; exact on quadratics.

    Two batches of one pass over n samples share none: their product is lower by about tr Σ/(n − 1).

    Source: derived for this project.
    """
    check_positive(lr=lr, batch=batch)
    return grad_sq * (1 - lr * curvature) - lr * noise_curvature * variance / batch


def progress_critical_batch(batch: float, grad_sq: float, product: float, excess: float = 0.0) -> float:
    """Return b̂* = b·(|G|² − I)/|G|², the batch at which I = mean ⟨g_t, g_(t+1)⟩, measured at b, would be 0.

    Exact if I = 0. Else it is off by η·κ_G of the way to it, κ_G = GᵀHG/|G|²; `excess` = η·κ_G, if it is known, makes
    it exact. Return inf if |G|² is not positive or if no batch is large enough (η·κ_G ≥ 1).

    Source: derived for this project.
    """
    check_positive(batch=batch)
    if grad_sq <= 0 or excess >= 1:
        return math.inf
    return batch * (1 - product / grad_sq - excess) / (1 - excess)


def removable_loss(lr: float, variance: float, batch: float) -> float:
    """Return η·tr Σ/(4b), the loss that SGD's noise keeps up and that annealing η/b to 0 removes.

    On a quadratic whose directions have settled it is Σ η·c/(2b(2 − ηh)) over curvatures h with noise c each. This is
    that for ηh → 0, low by a factor of at most 2/(2 − ηL). Directions that have not settled hold less.

    Source: derived for this project.
    """
    check_positive(lr=lr, batch=batch)
    return lr * variance / (4 * batch)


# ── rules of policies ───────────────────────────────────────────────────────────────────────────────────────────


def adascale_gain(scale: float, variance: float, grad_sq: float, power: float = 1.0) -> float:
    """Return AdaScale's gain (σ² + |G|²)/(σ²/s + |G|²), between 1 and s = `scale` ≥ 1.

    `variance` is that of the base batch's gradient, tr Σ/b₀; s is the batch over b₀. The gain multiplies the learning
    rate and counts the base steps that an update is worth. `power` ½ is the form for Adam. Without noise and gradient
    it is 1.

    Source: Johnson et al. 2020, arXiv 2007.05105.
    """
    if not (scale >= 1 and variance >= 0 and grad_sq >= 0):
        raise ValueError(f"scale={scale} must be at least 1, variance={variance} and grad_sq={grad_sq} at least 0")
    below = variance / scale + grad_sq
    return ((variance + grad_sq) / below) ** power if below > 0 else 1.0


def cabs_batch(lr: float, variance: float, loss: float) -> float:
    """Return b = η·tr Σ/f, samples, for SGD without momentum and a least loss of 0.

    Source: Balles et al. 2017, arXiv 1612.05086.
    """
    check_positive(lr=lr, loss=loss)
    return lr * variance / loss
