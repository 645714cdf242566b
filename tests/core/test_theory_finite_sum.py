"""The τ-nice optimum against a search of every batch, every subset of small problems, and SGD's exact recursion."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow.theory.finite_sum import FiniteSum


@st.composite
def problems(draw: st.DrawFn) -> FiniteSum:
    """Any problem with L ≤ L_max ≤ nL."""
    samples, smoothness = draw(st.integers(2, 400)), draw(st.floats(0.01, 100))
    largest = smoothness * (1 + draw(st.floats(0, 0.99)) * (samples - 1))
    mu, optimum_sq = draw(st.floats(0.01, 1)) * smoothness, draw(st.floats(0, 100))
    return FiniteSum(samples=samples, smoothness=smoothness, largest_smoothness=largest, mu=mu, optimum_sq=optimum_sq)


def costs(problem: FiniteSum, epsilon: float) -> list[float]:
    """τ·max{L(τ), 2σ(τ)/(εμ)} for τ = 1 … n, written out."""
    n, full, one = problem.samples, problem.smoothness, problem.largest_smoothness
    return [
        tau
        * max(
            (n * (tau - 1) * full + (n - tau) * one) / (tau * (n - 1)),
            2 * (n - tau) * problem.optimum_sq / (tau * (n - 1)) / (epsilon * problem.mu),
        )
        for tau in range(1, n + 1)
    ]


@settings(deadline=None)
@given(problems(), st.floats(0.001, 10))
def test_no_batch_costs_less_than_the_best_whole_one(problem: FiniteSum, epsilon: float) -> None:
    every, best = costs(problem, epsilon), problem.best_whole_batch(epsilon)
    assert every[best - 1] == pytest.approx(min(every), rel=1e-9)
    assert 1 <= problem.best_batch(epsilon) <= problem.samples * (1 + 1e-9)
    assert abs(best - problem.best_batch(epsilon)) < 1
    assert problem.complexity(np.arange(1.0, problem.samples + 1), epsilon) == pytest.approx(every, rel=1e-9)


def test_the_best_batch_is_one_already_where_the_formula_lies_between_zero_and_one() -> None:
    problem = FiniteSum(samples=100, smoothness=1, largest_smoothness=10, mu=1, optimum_sq=4.75)
    kappa = 2 * 4.75 / 1.0
    formula = 100 * (kappa - 9) / (kappa + 100 - 10)
    assert 0 < formula < 1
    assert problem.best_batch(1.0) == problem.best_whole_batch(1.0) == 1 + int(np.argmin(costs(problem, 1.0)))


def test_without_noise_at_the_optimum_one_sample_is_best() -> None:
    problem = FiniteSum(samples=50, smoothness=1, largest_smoothness=3, mu=0.1, optimum_sq=0)
    assert problem.best_whole_batch(0.01) == 1


def test_ever_finer_targets_want_the_full_batch() -> None:
    problem = FiniteSum(samples=50, smoothness=1, largest_smoothness=3, mu=0.1, optimum_sq=2)
    batches = [problem.best_batch(epsilon) for epsilon in (10, 1, 0.1, 0.01, 1e-9)]
    assert batches == sorted(batches)
    assert batches[-1] == pytest.approx(50, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_the_noise_at_the_optimum_is_that_of_every_subset(batch: int) -> None:
    gradients = np.array([[1.0, 2.0], [-3.0, 0.5], [0.2, -4.0], [0.8, 1.0], [1.0, 0.5]])  # they sum to 0
    problem = FiniteSum(
        samples=5, smoothness=1, largest_smoothness=2, mu=1, optimum_sq=float((gradients**2).sum(1).mean())
    )
    squares = [(gradients[list(rows)].mean(0) ** 2).sum() for rows in combinations(range(5), batch)]
    assert problem.optimum_noise(float(batch)) == pytest.approx(np.mean(squares), rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=6), st.data())
def test_the_expected_smoothness_bounds_the_mean_square_over_every_subset(
    curvatures: list[float], data: st.DataObject
) -> None:
    batch, mean = data.draw(st.integers(1, len(curvatures))), float(np.mean(curvatures))
    problem = FiniteSum(
        samples=len(curvatures), smoothness=mean, largest_smoothness=max(curvatures), mu=mean, optimum_sq=0
    )
    squares = [np.mean(chosen) ** 2 for chosen in combinations(curvatures, batch)]  # f_i = a_i x²/2 at x = 1
    assert np.mean(squares) <= problem.expected_smoothness(float(batch)) * mean * (1 + 1e-9)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_expected_smoothness_is_reached_where_one_sample_has_all_the_curvature(batch: int) -> None:
    problem = FiniteSum(samples=4, smoothness=2, largest_smoothness=8, mu=2, optimum_sq=0)
    squares = [np.mean(chosen) ** 2 for chosen in combinations([8.0, 0.0, 0.0, 0.0], batch)]
    assert problem.expected_smoothness(float(batch)) * 2 == pytest.approx(np.mean(squares), rel=1e-9)


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("epsilon", [1.0, 0.01])
def test_the_complexity_brings_sgd_to_its_target(batch: int, epsilon: float) -> None:
    problem = FiniteSum(samples=64, smoothness=2, largest_smoothness=2, mu=2, optimum_sq=3)  # f_i = (x − c_i)²
    lr, square = problem.lr(batch, epsilon), 100.0
    assert problem.optimum_noise(float(batch)) == pytest.approx(3 / batch * (64 - batch) / 63)
    updates = math.ceil(2 * problem.complexity(float(batch), epsilon) / batch / 2 * math.log(2 * square / epsilon))
    for _ in range(updates):
        square = (1 - lr * 2) ** 2 * square + lr**2 * 3 / batch * (64 - batch) / 63
    assert square <= epsilon


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"samples": 1}, "samples=1 must be at least 2"),
        ({"largest_smoothness": 0.5}, r"largest_smoothness=0\.5 must lie between smoothness=1"),
        ({"largest_smoothness": 11}, "largest_smoothness=11 must lie between"),
        ({"mu": 0}, "mu=0 must be above 0"),
        ({"optimum_sq": -1}, "optimum_sq=-1 must be at least 0"),
    ],
)
def test_a_problem_that_cannot_be_is_refused(change: dict[str, float], why: str) -> None:
    values = {"samples": 10, "smoothness": 1, "largest_smoothness": 2, "mu": 1, "optimum_sq": 1, **change}
    with pytest.raises(ValueError, match=why):
        FiniteSum(**values)  # pyright: ignore[reportArgumentType]


def test_a_target_that_is_not_above_zero_is_refused() -> None:
    problem = FiniteSum(samples=50, smoothness=1, largest_smoothness=3, mu=0.1, optimum_sq=2)
    with pytest.raises(ValueError, match="epsilon=0 must be above 0"):
        problem.best_batch(0)
