"""Formulas of extrapolation, against loops of the updates themselves on quadratics."""

import math
import random

import pytest

from distgrow.theory import extrapolation

CURVATURES = [k / 400 for k in range(1, 401)]  # up to L = 1


def fresh(lr: float, rate: float, curvature: float, updates: int) -> float:
    x = 1.0
    for _ in range(updates):
        x -= lr * curvature * (x - rate * curvature * x)
    return abs(x)


def past(lr: float, rate: float, curvature: float, updates: int) -> float:
    x, before = 1.0, 0.0
    for _ in range(updates):
        before = curvature * (x - rate * before)
        x -= lr * before
    return abs(x)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 0.5, 0.6, 0.9])
@pytest.mark.parametrize(
    ("walk", "limit"),
    [(fresh, extrapolation.fresh_stability_limit), (past, extrapolation.past_stability_limit)],
    ids=["fresh", "past"],
)
def test_updates_shrink_every_error_below_the_limit_and_some_grow_above_it(rate: float, walk, limit) -> None:  # pyright: ignore
    """The smallest curvature is left out below the limit: it shrinks by less than these updates show."""
    border = limit(rate, 1.0)
    assert max(walk(0.98 * border, rate, c, 3000) for c in CURVATURES[4:]) < 0.9
    assert max(walk(1.02 * border, rate, c, 3000) for c in CURVATURES) > 10


def test_a_rate_from_1_by_l_on_leaves_no_stable_learning_rate() -> None:
    for rate in (1.0, 1.5):
        assert extrapolation.fresh_stability_limit(rate, 1.0) == extrapolation.past_stability_limit(rate, 1.0) == 0
        assert fresh(0.1, rate + 1e-3, 1.0, 2_000) > 1
    assert past(0.1, 1.0, 1.0, 3000) > 1


def test_half_of_1_by_l_doubles_the_limit_of_sgd_and_a_past_shift_of_the_learning_rate_makes_it_a_third() -> None:
    assert extrapolation.fresh_stability_limit(0.25, 2.0) == pytest.approx(2 * (2 / 2.0))
    lr = 2 / (3 * 2.0)
    assert extrapolation.past_stability_limit(lr, 2.0) == pytest.approx(lr)


def test_errors_shrink_by_the_factor_of_each_kind() -> None:
    for lr, rate, curvature in ((0.3, 0.2, 1.0), (0.5, 0.7, 0.6), (1.2, 0.3, 1.0)):
        factor = extrapolation.fresh_factor(lr, rate, curvature)
        assert fresh(lr, rate, curvature, 7) == pytest.approx(abs(factor) ** 7)
        slope = math.log(past(lr, rate, curvature, 400) / past(lr, rate, curvature, 200)) / 200
        assert slope == pytest.approx(math.log(extrapolation.past_rate(lr, rate, curvature)), rel=1e-6)


def test_the_variance_of_a_shift_is_that_of_a_batch_mean() -> None:
    numbers, rate, batch = random.Random(0), 0.3, 16
    squares = [(rate * sum(numbers.gauss(0, 2) for _ in range(batch)) / batch) ** 2 for _ in range(20_000)]
    assert sum(squares) / len(squares) == pytest.approx(extrapolation.shift_variance(rate, 4.0, batch), rel=0.05)
