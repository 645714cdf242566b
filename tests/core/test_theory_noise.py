"""Estimators and gains against exact enumeration of every draw, and against Monte Carlo runs on quadratics."""

import math
from collections.abc import Callable
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow.theory.noise import (
    adascale_gain,
    batch_variance,
    cabs_batch,
    critical_batch_now,
    directed_critical_batch,
    expected_decrease,
    grad_sq_estimate,
    noise_scale,
    preconditioned_critical_batch,
    progress_critical_batch,
    progress_product,
    sfo_overhead,
    steps_overhead,
    temperature,
    variance_estimate,
)

#: Gradients of a whole population of six samples, in two dimensions.
GRADIENTS = np.array([[1.0, -2.0], [0.5, 3.0], [-4.0, 0.1], [2.2, 2.0], [0.0, -1.0], [3.0, 0.7]])
MEAN = GRADIENTS.mean(0)
GRAD_SQ = float(MEAN @ MEAN)
VARIANCE = float(((GRADIENTS - MEAN) ** 2).sum(1).mean())
#: A diagonal quadratic: Hessian, position, and noise covariance of one sample.
HESSIAN, POINT, NOISE = np.array([2.0, 0.5, 0.1]), np.array([0.4, -1.0, 3.0]), np.array([1.5, 0.2, 4.0])
G = HESSIAN * POINT
QUADRATIC = {
    "grad_sq": float(G @ G),
    "variance": float(NOISE.sum()),
    "curvature": float(G @ (HESSIAN * G) / (G @ G)),
    "noise_curvature": float(HESSIAN @ NOISE / NOISE.sum()),
}


def mean_square(rows: tuple[int, ...]) -> float:
    """‖mean gradient of these samples‖²."""
    mean = GRADIENTS[list(rows)].mean(0)
    return float(mean @ mean)


def subsets(batch: int) -> float:
    """Mean ‖mean gradient‖² over every batch drawn without replacement."""
    return float(np.mean([mean_square(rows) for rows in combinations(range(6), batch)]))


def tuples(batch: int) -> float:
    """Mean ‖mean gradient‖² over every batch of independent draws."""
    return float(np.mean([mean_square(rows) for rows in product(range(6), repeat=batch)]))


def decrease(lr: float, batch: float) -> float:
    """Expected fall of the quadratic's loss by one update, from the moments of the next point."""
    after = POINT - lr * G
    return float((HESSIAN * POINT**2).sum() - (HESSIAN * (after**2 + lr**2 * NOISE / batch)).sum()) / 2


# ── estimators ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("small", "large"), [(1, 2), (1, 4), (2, 3), (3, 5)])
def test_both_estimates_average_to_the_truth_over_every_independent_draw(small: int, large: int) -> None:
    pair = tuples(small), tuples(large)
    assert variance_estimate(*pair, small, large) == pytest.approx(VARIANCE, rel=1e-9)
    assert grad_sq_estimate(*pair, small, large) == pytest.approx(GRAD_SQ, rel=1e-9)


@pytest.mark.parametrize(("small", "large"), [(1, 2), (2, 4), (3, 6), (5, 6)])
def test_both_estimates_average_to_the_truth_over_every_draw_without_replacement(small: int, large: int) -> None:
    pair = subsets(small), subsets(large)
    assert variance_estimate(*pair, small, large) == pytest.approx(VARIANCE * 6 / 5, rel=1e-9)
    assert grad_sq_estimate(*pair, small, large, population=6) == pytest.approx(GRAD_SQ, rel=1e-9)
    assert grad_sq_estimate(*pair, small, large) == pytest.approx(GRAD_SQ - VARIANCE / 5, rel=1e-9)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6])
def test_the_variance_of_a_batch_is_that_of_every_draw(batch: int) -> None:
    assert batch_variance(VARIANCE, batch, 6) == pytest.approx(subsets(batch) - GRAD_SQ, rel=1e-9, abs=1e-12)
    if batch < 6:
        assert batch_variance(VARIANCE, batch) == pytest.approx(tuples(batch) - GRAD_SQ, rel=1e-9)


def test_two_batches_of_one_pass_have_a_product_lower_by_the_variance_over_the_others() -> None:
    products = [
        GRADIENTS[list(first)].mean(0) @ GRADIENTS[list(second)].mean(0)
        for first in combinations(range(6), 2)
        for second in combinations(set(range(6)) - set(first), 3)
    ]
    assert np.mean(products) == pytest.approx(GRAD_SQ - VARIANCE / 5, rel=1e-9)


# ── noise scale ─────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 100), st.floats(0.1, 1000))
def test_the_overheads_are_those_of_the_best_learning_rate_where_curvature_is_the_same_everywhere(
    curvature: float, grad_sq: float, variance: float, batch: float
) -> None:
    def best(size: float) -> float:
        lr = np.geomspace(1e-7, 1, 100_001) / curvature
        return float(np.max(lr * grad_sq - lr**2 / 2 * curvature * (grad_sq + variance / size)))

    scale = noise_scale(variance, grad_sq)
    assert steps_overhead(batch, scale) == pytest.approx(best(1e12) / best(batch), rel=1e-3)
    smallest = grad_sq**2 / (2 * curvature * variance)  # progress per sample as the batch goes to 0
    assert sfo_overhead(batch, scale) == pytest.approx(smallest / (best(batch) / batch), rel=1e-3)


def test_without_a_gradient_the_noise_scale_is_infinite() -> None:
    assert noise_scale(2.0, 0.0) == noise_scale(2.0, -0.1) == math.inf


@pytest.mark.parametrize("factor", [2, 8])
def test_equal_temperature_is_equal_stationary_noise(factor: int) -> None:
    def stationary(lr: float, batch: float) -> float:  # of E θ² ← (1 − η)²E θ² + η²/b
        return lr**2 / batch / (1 - (1 - lr) ** 2)

    lr, batch = 1e-4, 16
    assert temperature(lr * factor, batch * factor) == pytest.approx(temperature(lr, batch))
    assert stationary(lr * factor, batch * factor) == pytest.approx(stationary(lr, batch), rel=1e-3)
    root = factor**0.5
    assert temperature(lr * root, batch * factor, 0.5) == pytest.approx(temperature(lr, batch, 0.5))
    normalised = [stationary(rate * size**0.5, size) for rate, size in ((lr, batch), (lr * root, batch * factor))]
    assert normalised[1] == pytest.approx(normalised[0], rel=1e-2)


# ── critical batches ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lr", [0.05, 0.3, 0.8])
def test_the_directed_critical_batch_makes_most_progress_per_sample(lr: float) -> None:
    grid = np.geomspace(1e-3, 1e4, 60_001)
    rates = [decrease(lr, batch) / batch for batch in grid]
    assert directed_critical_batch(lr=lr, **QUADRATIC) == pytest.approx(grid[int(np.argmax(rates))], rel=1e-3)


@pytest.mark.parametrize("lr", [0.01, 0.05])
def test_the_preconditioned_critical_batch_makes_most_progress_per_sample(lr: float) -> None:
    """And is that of plain steps in y = P^−½·x, where gradients are P^½·g and the Hessian is P^½·H·P^½."""
    scale, mix = np.array([4.0, 0.5, 9.0]), np.array([[2.0, 0.3, 0.1], [0.3, 1.0, -0.2], [0.1, -0.2, 0.5]])
    p, g, noise = np.diag(scale), mix @ POINT, np.diag(NOISE)
    php = p @ mix @ p
    ours = preconditioned_critical_batch(float(g @ p @ g), float(np.trace(php @ noise)), lr, float(g @ php @ g))
    grid = np.geomspace(1e-3, 1e4, 60_001)
    rates = (lr * g @ p @ g - lr**2 / 2 * (g @ php @ g + np.trace(php @ noise) / grid)) / grid
    assert ours == pytest.approx(grid[int(np.argmax(rates))], rel=1e-3)
    root = np.sqrt(p)
    g_y, hessian_y, noise_y = root @ g, root @ mix @ root, root @ noise @ root
    plain = {
        "grad_sq": g_y @ g_y,
        "variance": np.trace(noise_y),
        "curvature": g_y @ hessian_y @ g_y / (g_y @ g_y),
        "noise_curvature": np.trace(hessian_y @ noise_y) / np.trace(noise_y),
    }
    assert ours == pytest.approx(directed_critical_batch(lr=lr, **plain), rel=1e-12)


@settings(deadline=None)
@given(st.floats(0.1, 10), st.floats(0.05, 0.95), st.floats(0.1, 100), st.floats(0.01, 10))
def test_the_measured_critical_batch_is_the_bounds_for_the_present_gradient(
    smoothness: float, share: float, variance: float, grad_sq: float
) -> None:
    lr = share * 2 / smoothness
    grid = np.geomspace(1e-4, 1e6, 100_001)  # N(b) of C₁/T + C₂/b = |G|², up to C₁
    c2 = smoothness * lr * variance / (2 - smoothness * lr)
    margin = grad_sq * grid - c2
    costs = np.where(margin > 0, grid**2 / np.where(margin > 0, margin, 1), math.inf)
    expected = grid[int(np.argmin(costs))]
    assert critical_batch_now(variance, grad_sq, lr, smoothness) == pytest.approx(expected, rel=1e-3)


def test_no_batch_is_critical_where_the_full_gradient_makes_no_progress() -> None:
    assert critical_batch_now(1.0, 1.0, 2.0, 1.0) == critical_batch_now(1.0, -1.0, 3.0, 1.0) == math.inf
    assert critical_batch_now(1.0, 0.0, 0.1, 1.0) == math.inf


@pytest.mark.parametrize(("lr", "batch"), [(0.1, 1), (0.3, 8), (0.8, 64)])
def test_the_expected_decrease_and_product_are_those_of_many_sampled_updates(lr: float, batch: int) -> None:
    random, count = np.random.default_rng(7), 400_000
    now = G + random.standard_normal((count, 3)) * np.sqrt(NOISE / batch)
    after = POINT - lr * now
    then = HESSIAN * after + random.standard_normal((count, 3)) * np.sqrt(NOISE / batch)
    falls = (HESSIAN * (POINT**2 - after**2)).sum(1) / 2
    products = (now * then).sum(1)
    for sampled, formula in ((falls, expected_decrease), (products, progress_product)):
        error = sampled.std() / math.sqrt(count)
        assert formula(lr=lr, batch=batch, **QUADRATIC) == pytest.approx(sampled.mean(), abs=4 * error)


@settings(deadline=None)
@given(st.floats(0.01, 0.6), st.floats(0.1, 1000))
def test_the_progress_test_points_to_the_batch_at_which_it_is_zero(lr: float, batch: float) -> None:
    def product_at(size: float) -> float:  # Gᵀ(I − ηH)G − η tr(HΣ)/b, written out
        return float(G @ (G - lr * HESSIAN * G) - lr * (HESSIAN * NOISE).sum() / size)

    low, high = 1e-9, 1e9
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if product_at(middle) > 0 else (middle, high)
    excess = lr * QUADRATIC["curvature"]
    exact = progress_critical_batch(batch, QUADRATIC["grad_sq"], product_at(batch), excess)
    plain = progress_critical_batch(batch, QUADRATIC["grad_sq"], product_at(batch))
    assert exact == pytest.approx(high, rel=1e-6)
    assert plain - high == pytest.approx(excess * (batch - high), rel=1e-6, abs=1e-6 * (batch + high))
    assert progress_critical_batch(high, QUADRATIC["grad_sq"], product_at(high)) == pytest.approx(high, rel=1e-6)


def test_no_batch_is_large_enough_without_a_gradient_or_beyond_stability() -> None:
    assert progress_critical_batch(8, 0.0, 1.0) == progress_critical_batch(8, 1.0, -1.0, excess=1.0) == math.inf


# ── rules of policies ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scale", [1, 2, 16])
def test_adascales_gain_is_the_ratio_of_sampled_square_gradients(scale: int) -> None:
    random, count = np.random.default_rng(3), 200_000
    base = ((G + random.standard_normal((count, 3)) * np.sqrt(NOISE)) ** 2).sum(1)
    scaled = ((G + random.standard_normal((count, 3)) * np.sqrt(NOISE / scale)) ** 2).sum(1)
    gain = adascale_gain(scale, QUADRATIC["variance"], QUADRATIC["grad_sq"])
    assert gain == pytest.approx(base.mean() / scaled.mean(), rel=0.01)
    assert adascale_gain(scale, QUADRATIC["variance"], QUADRATIC["grad_sq"], 0.5) ** 2 == pytest.approx(gain)


@given(st.floats(1, 1000), st.floats(0, 100), st.floats(0.001, 100))
def test_adascales_gain_lies_between_one_and_the_scale_and_costs_the_noise_scales_overhead(
    scale: float, variance: float, grad_sq: float
) -> None:
    gain = adascale_gain(scale, variance, grad_sq)
    assert 1 - 1e-9 <= gain <= scale * (1 + 1e-9)
    overhead = (variance + scale * grad_sq) / (variance + grad_sq)  # (1 + s·b₀/B)/(1 + b₀/B), B/b₀ = σ²/|G|²
    assert scale / gain == pytest.approx(overhead, rel=1e-9)


def test_adascales_gain_is_the_scale_in_pure_noise_and_one_without_it() -> None:
    assert adascale_gain(8, 2.0, 0.0) == pytest.approx(8)
    assert adascale_gain(8, 0.0, 2.0) == adascale_gain(8, 0.0, 0.0) == 1


@settings(deadline=None)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 100))
def test_cabs_is_the_batch_of_most_progress_per_sample_at_a_learning_rate_of_one_over_l(
    smoothness: float, square: float, variance: float
) -> None:
    loss, lr = smoothness * square / 2, 1 / smoothness
    grid = np.geomspace(1e-4, 1e6, 40_001)
    after = (1 - lr * smoothness) ** 2 * square + lr**2 * variance / grid
    best = grid[int(np.argmax((loss - smoothness * after / 2) / grid))]
    assert cabs_batch(lr, variance, loss) == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: variance_estimate(1.0, 1.0, 8, 8), "large=8 must be above small=8"),
        (lambda: grad_sq_estimate(1.0, 1.0, 0, 8), "small=0 must be above 0"),
        (lambda: grad_sq_estimate(1.0, 1.0, 4, 8, 7), "large=8 must be at most population=7"),
        (lambda: batch_variance(1.0, 9, 8), "batch=9 must be at most population=8"),
        (lambda: sfo_overhead(8, 0.0), r"scale=0\.0 must be above 0"),
        (lambda: critical_batch_now(1.0, 1.0, 0.0, 1.0), r"lr=0\.0 must be above 0"),
        (lambda: adascale_gain(0.5, 1.0, 1.0), r"scale=0\.5 must be at least 1"),
        (lambda: adascale_gain(2, -1.0, 1.0), r"variance=-1\.0 and grad_sq=1\.0 at least 0"),
        (lambda: cabs_batch(0.1, 1.0, 0.0), r"loss=0\.0 must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(call: Callable[[], object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        call()
