"""Critical batch, critical delay and the stability of delayed SGD, as plain arithmetic; knows no engine.

Delayed SGD is θ_(t+1) = θ_t − η·g(θ_(t−τ)): the gradient of update t is applied τ updates later. The noise model is
E‖g_i − G‖² ≤ M‖G‖² + σ² for the gradient g_i of one sample. Symbols: M (`multiplier`), samples; σ² (`variance`),
gradient²; L (`smoothness`), loss / parameter²; ε (`target`), target of ‖∇f‖², gradient²; b (`batch`), samples;
τ (`delay`), updates; η (`lr`); λ (`curvature`), loss / parameter², of a quadratic; h = ηλ. Formulas that were derived
for this project, after the abstract of Stich, Mohtashami & Jaggi, are held against simulation by their tests.
"""

import math

from distgrow.theory.numbers import check_positive


def saturation_batch(multiplier: float, variance: float, target: float) -> float:
    """Return b_crit = M + 2σ²/ε, samples: the batch at which the SFO of synchronous SGD has doubled.

    Far below it the SFO is flat, and updates fall as 1/b. Far above it updates are flat. It grows as 1/ε.

    Source: derived for this project, after Stich, Mohtashami & Jaggi 2021, arXiv 2103.02351.
    """
    _check_noise(multiplier, variance, target)
    return multiplier + 2 * variance / target


def critical_delay(multiplier: float, variance: float, target: float, batch: float) -> float:
    """Return τ_crit = (M + σ²/ε)/b, updates: delays far below it cost next to nothing.

    The delay is free as long as (τ + 1)b is below M + σ²/ε, in order of magnitude.

    Source: derived for this project, after Stich, Mohtashami & Jaggi 2021, arXiv 2103.02351.
    """
    _check_noise(multiplier, variance, target)
    check_positive(batch=batch)
    return (multiplier + variance / target) / batch


def synchronous_lr(smoothness: float, multiplier: float, variance: float, batch: float, target: float) -> float:
    """Return η = min{1/(L(1 + M/b)), εb/(2Lσ²)}: SGD without delay then needs `synchronous_steps`.

    It is proportional to b up to about b_crit, then constant.

    Source: derived for this project, after Stich, Mohtashami & Jaggi 2021, arXiv 2103.02351.
    """
    return _lr(smoothness, 1 + _per_sample(multiplier, batch), variance, batch, target)


def synchronous_steps(
    smoothness: float, multiplier: float, variance: float, gap: float, batch: float, target: float
) -> float:
    """Return T = 4Δ/(ηε) = (4LΔ/ε)·max{1 + M/b, 2σ²/(εb)}, updates until the mean of E‖∇f‖² is at most ε.

    Δ = f(θ₀) − f* is `gap`, loss. The SFO is bT.

    Source: derived for this project, after Stich, Mohtashami & Jaggi 2021, arXiv 2103.02351.
    """
    check_positive(gap=gap)
    return 4 * gap / (target * synchronous_lr(smoothness, multiplier, variance, batch, target))


def delayed_lr(
    smoothness: float,
    multiplier: float,
    variance: float,
    batch: float,
    target: float,
    delay: int,
    constant: float = 2.0,
) -> float:
    """Return η = min{1/(cL(τ + 1 + M/b)), εb/(2Lσ²)}, the learning rate of delayed SGD; c is `constant`, about 2 to 4.

    It is constant in τ up to about τ_crit, then proportional to 1/τ.

    Source: derived for this project, after Stich, Mohtashami & Jaggi 2021, arXiv 2103.02351.
    """
    check_positive(constant=constant)
    slowed = constant * (_checked(delay) + 1 + _per_sample(multiplier, batch))
    return _lr(smoothness, slowed, variance, batch, target)


def delay_adaptive_lr(lr: float, smoothness: float, delay: float, concurrency: float) -> float:
    """Return η for a gradient that is `delay` updates old: η up to τ_C, beyond it min{η, 1/(4Lτ)}.

    τ_C is `concurrency`, the gradients that are computed at a time. Any smaller rate will do beyond τ_C, and 0, which
    drops the gradient. It holds for η up to 1/(4L).

    Source: Koloskova, Stich & Jaggi 2022, arXiv 2206.08307.
    """
    check_positive(lr=lr, smoothness=smoothness, concurrency=concurrency)
    if lr > 1 / (4 * smoothness):
        raise ValueError(f"lr={lr} must be at most 1/(4L)={1 / (4 * smoothness):.6g}")
    return lr if delay <= concurrency else min(lr, 1 / (4 * smoothness * delay))


# ── a quadratic of curvature λ: θ_(t+1) = θ_t − h·θ_(t−τ), h = ηλ ───────────────────────────────────────────────


def stability_limit(delay: int) -> float:
    """Return 2 sin(π/(4τ + 2)): delayed SGD is stable if and only if h = ηλ is below it; 2 without delay.

    Source: derived for this project.
    """
    return 2 * math.sin(math.pi / (4 * _checked(delay) + 2))


def momentum_stability_limit(delay: int, momentum: float) -> float:
    """Return the `stability_limit` of SGD with momentum μ: 2(1 + μ) without delay, but 1 − μ at τ = 1.

    A root z = e^(iθ) leaves the unit circle at h = 2 sin(θ/2)·|z − μ|, θ the least solution of
    (τ − ½)θ + arg(z − μ) = π/2. For heavy-ball momentum, θ_(t+1) = θ_t + μ(θ_t − θ_(t−1)) − h·θ_(t−τ), as torch's SGD
    has it without `nesterov`.

    Source: derived for this project.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must be at least 0 and below 1")
    if not _checked(delay):
        return 2 * (1 + momentum)
    low, high = 0.0, math.pi
    for _ in range(60):  # the left side rises along θ
        middle = (low + high) / 2
        angle = math.atan2(math.sin(middle), math.cos(middle) - momentum)
        low, high = (middle, high) if (delay - 0.5) * middle + angle < math.pi / 2 else (low, middle)
    return 2 * math.sin(low / 2) * math.hypot(math.cos(low) - momentum, math.sin(low))


def best_step(delay: int) -> float:
    """Return h = τ^τ/(τ + 1)^(τ + 1), the ηλ at which the error falls fastest; 1 without delay.

    Source: derived for this project.
    """
    return (_checked(delay) / (delay + 1)) ** delay / (delay + 1)


def best_rate(delay: int) -> float:
    """Return τ/(τ + 1), by which the error shrinks each update at `best_step`.

    Source: derived for this project.
    """
    return _checked(delay) / (delay + 1)


def stationary_variance(curvature: float, lr: float, variance: float, delay: int) -> float:
    """Return E θ² in the long run, parameter², if noise of `variance` is added to each gradient.

    It is η²v/(2h·cos ϑ₀)·(1 + sin ϑ)/cos ϑ with ϑ₀ = arcsin(h/2) and ϑ = (2τ + 1)ϑ₀, exact for every τ: up to lag
    τ + 1 the autocovariance is a cosine of frequency 2ϑ₀. Return inf from the stability limit on.

    Source: derived for this project.
    """
    check_positive(curvature=curvature, lr=lr, variance=variance)
    h = lr * curvature
    if h >= stability_limit(delay):
        return math.inf
    half = math.asin(h / 2)
    angle = (2 * delay + 1) * half
    return lr**2 * variance / (2 * h * math.cos(half)) * (1 + math.sin(angle)) / math.cos(angle)


def _lr(smoothness: float, slowed: float, variance: float, batch: float, target: float) -> float:
    check_positive(smoothness=smoothness, target=target)
    _check_noise(0.0, variance, target)
    noise = target * batch / (2 * smoothness * variance) if variance else math.inf
    return min(1 / (smoothness * slowed), noise)


def _per_sample(multiplier: float, batch: float) -> float:
    _check_noise(multiplier, 0.0, 1.0)
    check_positive(batch=batch)
    return multiplier / batch


def _check_noise(multiplier: float, variance: float, target: float) -> None:
    check_positive(target=target)
    if not (multiplier >= 0 and variance >= 0):
        raise ValueError(f"multiplier={multiplier} and variance={variance} must be at least 0")


def _checked(delay: int) -> int:
    if not delay >= 0:
        raise ValueError(f"delay={delay} must be at least 0")
    return delay
