"""The spread of gradient evaluations over updates against rivals, grids and the recursion itself."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow.theory.allocation import (
    best_batches,
    least_samples,
    pl_batch_factor,
    pl_error,
    pl_noise,
    pl_rate,
    pl_saving,
    pl_saving_limit,
    pl_weights,
    saving,
)

weights_lists = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


def iterate(start: float, rate: float, noise: float, batches: np.ndarray) -> float:
    """e ← ρe + c/b, once for each batch."""
    error = start
    for batch in batches:
        error = rate * error + noise / float(batch)
    return error


def samples_for(shape: np.ndarray, rate: float, target: float) -> float:
    """Σ b of the batches in proportion to `shape` after which iterated noise (c = 1) is `target`."""
    return float(shape.sum() * iterate(0.0, rate, 1.0, shape) / target)


# ── the general principle ───────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(weights_lists, st.floats(0.01, 10), st.data())
def test_no_rival_of_equal_noise_costs_less_than_the_best_batches(
    weights: list[float], noise: float, data: st.DataObject
) -> None:
    best = best_batches(weights, noise)
    assert sum(w / b for w, b in zip(weights, best, strict=True)) == pytest.approx(noise, rel=1e-9)
    assert best.sum() == pytest.approx(least_samples(weights, noise), rel=1e-9)
    shape = data.draw(st.lists(st.floats(0.01, 100), min_size=len(weights), max_size=len(weights)))
    scale = sum(w / b for w, b in zip(weights, shape, strict=True)) / noise
    assert scale * sum(shape) >= best.sum() * (1 - 1e-9)


@settings(deadline=None)
@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0.01, 10))
def test_two_batches_are_those_of_a_fine_grid(first: float, second: float, noise: float) -> None:
    one = first / noise * (1 + np.geomspace(1e-4, 1e4, 40_001))
    other = second / (noise - first / one)
    at = int(np.argmin(one + other))
    assert one[at] + other[at] == pytest.approx(least_samples([first, second], noise), rel=1e-5)
    assert best_batches([first, second], noise) == pytest.approx([one[at], other[at]], rel=2e-2)


@given(weights_lists)
def test_the_saving_is_the_constant_batchs_cost_over_the_least(weights: list[float]) -> None:
    constant = sum(weights) / 2.0  # the batch at which Σ w/b = 2
    assert saving(weights) == pytest.approx(len(weights) * constant / least_samples(weights, 2.0), rel=1e-9)
    assert saving(weights) >= 1 - 1e-12


@given(st.floats(0.01, 100), st.integers(1, 20))
def test_equal_weights_save_nothing(weight: float, updates: int) -> None:
    assert saving([weight] * updates) == pytest.approx(1, rel=1e-12)


# ── near a minimum ──────────────────────────────────────────────────────────────────────────────────────────────

rates = st.floats(0.3, 0.999)


@given(rates, st.floats(0.1, 10), st.floats(0.01, 10), st.lists(st.floats(1, 1000), min_size=1, max_size=30))
def test_the_error_after_some_batches_is_the_recursions(
    rate: float, start: float, noise: float, batches: list[float]
) -> None:
    assert pl_error(start, rate, noise, batches) == pytest.approx(
        iterate(start, rate, noise, np.array(batches)), rel=1e-9
    )


@pytest.mark.parametrize(("rate", "updates"), [(0.8, 20), (0.95, 60), (0.99, 300)])
def test_the_best_geometric_growth_of_the_batch_is_that_of_a_fine_grid(rate: float, updates: int) -> None:
    grid = np.linspace(0.98, 1.2, 441)
    costs = [samples_for(factor ** np.arange(updates), rate, 0.1) for factor in grid]
    assert grid[int(np.argmin(costs))] == pytest.approx(pl_batch_factor(rate), abs=6e-4)
    assert min(costs) == pytest.approx(least_samples(pl_weights(rate, updates), 0.1), rel=1e-3)


@settings(deadline=None)
@given(rates, st.integers(1, 200))
def test_the_saving_near_a_minimum_is_that_of_the_iterated_recursion(rate: float, updates: int) -> None:
    constant = samples_for(np.ones(updates), rate, 0.1)
    grown = samples_for(rate ** (-np.arange(updates) / 2), rate, 0.1)
    assert pl_saving(rate, updates) == pytest.approx(constant / grown, rel=1e-8)


@pytest.mark.parametrize("depth", [0.1, 1, 4, 20])
def test_many_small_updates_save_the_closed_form_of_their_depth(depth: float) -> None:
    updates = 20_000
    rate = math.exp(-depth / updates)
    constant = samples_for(np.ones(updates), rate, 0.1)
    grown = samples_for(rate ** (-np.arange(updates) / 2), rate, 0.1)
    assert pl_saving_limit(depth) == pytest.approx(constant / grown, rel=1e-3)


def test_the_known_savings_by_depth() -> None:
    coth_of_1 = (math.e**2 + 1) / (math.e**2 - 1)
    assert pl_saving_limit(np.array([1e-6, 4.0, 400.0])) == pytest.approx([1, coth_of_1, 100], rel=1e-9)


@settings(deadline=None)
@given(
    st.lists(st.floats(0.1, 2), min_size=1, max_size=4),
    st.floats(0.05, 1),
    st.lists(st.integers(1, 64), min_size=1, max_size=40),
)
def test_sgd_on_a_quadratic_solved_exactly_stays_below_the_error(
    curvatures: list[float], share: float, batches: list[int]
) -> None:
    smoothness, mu, lr = max(curvatures), min(curvatures), share / max(curvatures)
    squares = [1.0 for _ in curvatures]  # E θ_i²; noise of variance 3 a sample, all of it on the steepest direction
    start = sum(h * s for h, s in zip(curvatures, squares, strict=True)) / 2
    for batch in batches:
        squares = [
            (1 - lr * h) ** 2 * s + (lr**2 * 3 / batch if i == curvatures.index(smoothness) else 0)
            for i, (h, s) in enumerate(zip(curvatures, squares, strict=True))
        ]
    excess = sum(h * s for h, s in zip(curvatures, squares, strict=True)) / 2
    if lr * mu < 1:
        error = pl_error(start, pl_rate(lr, mu, smoothness), pl_noise(lr, smoothness, 3.0), batches)
        assert excess <= error * (1 + 1e-9)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: best_batches([], 1.0), "got none"),
        (lambda: best_batches([1.0, 0.0], 1.0), "weights=.* must be above 0"),
        (lambda: least_samples([1.0], 0.0), r"noise=0\.0 must be above 0"),
        (lambda: pl_rate(1.1, 0.5, 1.0), r"lr=1\.1 must be at most 1/L=1 "),
        (lambda: pl_rate(0.1, 2.0, 1.0), r"mu=2\.0 must be at most smoothness=1\.0"),
        (lambda: pl_saving(1.0, 5), r"rate=1\.0 must lie between 0 and 1"),
        (lambda: pl_error(1.0, 0.9, 1.0, [8, 0]), "batches=.* must be above 0"),
        (lambda: pl_weights(0.9, 0), "updates=0 must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(call: Callable[[], object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        call()
