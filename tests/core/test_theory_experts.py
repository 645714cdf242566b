"""Formulas of sparse experts, against brute force over the number of active ones."""

import math

import numpy as np
import pytest

from distgrow.theory import experts

ONE = {"order": 1.0, "scale": 1.0, "dimension": 1.0}


@pytest.mark.parametrize(("samples", "best"), [(1000, 40), (8000, 80)])
def test_the_best_number_is_that_of_the_specification(samples: int, best: float) -> None:
    assert experts.best_active(complexity=4, samples=samples, **ONE) == pytest.approx(best, rel=1e-12)


def test_no_other_number_of_active_experts_has_a_smaller_error() -> None:
    numbers = np.random.default_rng(0)
    for _ in range(50):
        complexity, order, scale, dimension = numbers.uniform(0.3, 5, size=4).tolist()
        samples = float(numbers.uniform(10, 1e5))
        settings = {"order": order, "scale": scale, "samples": samples, "dimension": dimension}
        best = experts.best_active(complexity, **settings)
        least = experts.error(best, complexity, **settings)
        for factor in np.geomspace(0.01, 100, 400):
            assert least <= experts.error(best * factor, complexity, **settings) * (1 + 1e-12)


def test_the_best_number_becomes_proportional_to_the_complexity_as_the_order_grows() -> None:
    def ratio(order: float) -> float:
        settings = {"order": order, "scale": 1.0, "samples": 1000.0, "dimension": 1.0}
        return experts.best_active(6, **settings) / experts.best_active(3, **settings)

    assert [ratio(p) for p in (0.5, 1, 4)] == pytest.approx([2 ** (2 * p / (2 * p + 1)) for p in (0.5, 1, 4)])
    assert ratio(1000) == pytest.approx(2, rel=1e-3)


def test_the_gap_is_the_quoted_bound() -> None:
    inside = 2 * 2 * 3 * (1 + math.log(4)) + 3 * math.log(200) + math.log(80)
    assert experts.routing_gap(2, 8, samples=100, dimension=3) == pytest.approx(2 * math.sqrt(inside / 200))


def test_the_best_number_under_the_gap_is_that_of_trying_all() -> None:
    for complexity in (0.5, 1.0, 2.0, 4.0, 8.0):
        settings = {"order": 1.5, "scale": 1.0, "samples": 500.0, "dimension": 2.0}
        found = experts.best_active_by_gap(16, complexity, **settings)
        errors = {
            k: (complexity / k) ** 1.5 + experts.routing_gap(k, 16, samples=500, dimension=2) for k in range(1, 17)
        }
        assert errors[found] == min(errors.values())


def test_the_best_number_under_the_gap_rises_with_complexity_and_data_and_stays_among_the_experts() -> None:
    def best(complexity: float, samples: float) -> int:
        return experts.best_active_by_gap(16, complexity, order=1, scale=1, samples=samples, dimension=1)

    rising = [best(c, 300) for c in (0.01, 0.5, 1, 2, 4, 100)]
    assert rising == sorted(rising)
    assert (rising[0], rising[-1]) == (1, 16)
    assert best(0.1, 300) < best(0.1, 1000) < 16


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="active=9 exceeds experts=8"):
        experts.routing_gap(9, 8, samples=100, dimension=1)
    with pytest.raises(ValueError, match="complexity"):
        experts.best_active(complexity=0, samples=10, **ONE)
