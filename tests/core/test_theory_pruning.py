"""The density of a model that is pruned, against the released models and integration; the law of its loss."""

import math

import numpy as np
import pytest

from distgrow.theory.pruning import (
    Law,
    average_density,
    density_at_compute,
    density_at_samples,
    fit_law,
    mean_density,
    pruned_samples,
    samples_per_compute,
)

#: Of C = 10,000 updates: s, end of pruning, T, N̄/N by the formula; then what the released models' configs say of them.
RELEASED = [
    (0.2, 8_079, 11_204, 0.8926, 8_100, 11_200, 0.8919),
    (0.4, 8_885, 13_052, 0.7662, 8_875, 13_050, 0.7651),
    (0.6, 10_136, 16_386, 0.6103, 10_100, 16_375, None),
    (0.8, 12_559, 25_059, 0.3991, 12_600, 25_050, 0.3984),
]


@pytest.mark.parametrize(("sparsity", "end", "steps", "ratio", "their_end", "their_steps", "their_ratio"), RELEASED)
def test_the_released_models_were_pruned_so(
    sparsity: float, end: int, steps: int, ratio: float, their_end: int, their_steps: int, their_ratio: float | None
) -> None:
    total = 10_000 * samples_per_compute(sparsity)
    assert (round(pruned_samples(sparsity)[1] * total), round(total)) == (end, steps)
    assert average_density(sparsity) == pytest.approx(ratio, abs=5e-5)
    assert end == pytest.approx(their_end, rel=0.005)
    assert steps == pytest.approx(their_steps, rel=0.001)
    assert their_ratio is None or ratio == pytest.approx(their_ratio, rel=0.002)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(("start", "end"), [(0.25, 0.75), (0.0, 1.0), (0.1, 0.3)])
def test_a_density_linear_in_compute_is_geometric_in_samples(sparsity: float, start: float, end: float) -> None:
    count, spent = 20_000, 0.0
    total = samples_per_compute(sparsity, start, end)
    for k in range(count):  # integrate d compute / d samples = density, which is given as a function of compute
        here = density_at_samples((k + 0.5) / count, sparsity, start, end)
        spent += here * total / count / 2
        assert here == pytest.approx(density_at_compute(min(1.0, spent), sparsity, start, end), abs=2e-4)
        spent += here * total / count / 2
    assert spent == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("sparsity", [1e-9, 0.2, 0.5, 0.99])
def test_the_mean_density_of_a_geometric_phase_is_that_of_its_points(sparsity: float) -> None:
    points = (1 - sparsity) ** np.linspace(0.5 / 10_000, 1 - 0.5 / 10_000, 10_000)
    assert mean_density(sparsity) == pytest.approx(float(points.mean()), rel=1e-6)


def test_nothing_pruned_is_a_dense_run() -> None:
    assert mean_density(0.0) == samples_per_compute(0.0) == average_density(0.0) == 1.0
    assert {density_at_samples(k / 10, 0.0) for k in range(11)} == {1.0}


@pytest.mark.parametrize(("sparsity", "start", "end"), [(1.0, 0.25, 0.75), (-0.1, 0.25, 0.75), (0.5, 0.7, 0.7)])
def test_what_is_no_schedule_is_refused(sparsity: float, start: float, end: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        samples_per_compute(sparsity, start, end)


def test_a_fit_finds_the_law_that_losses_follow() -> None:
    law = Law(size_factor=406.4, data_factor=410.7, floor=1.69)
    rng = np.random.default_rng(0)
    sizes, data = 10 ** rng.uniform(7, 9, 15), 10 ** rng.uniform(9, 11, 15)
    found, rms = fit_law(list(sizes), list(data), [law.loss(*at) for at in zip(sizes, data, strict=True)])
    assert (found.size_factor, found.data_factor, found.floor) == pytest.approx((406.4, 410.7, 1.69), rel=1e-6)
    assert rms < 1e-9


def test_a_fit_is_the_nearest_of_all_laws_without_negative_terms() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        sizes, data, losses = rng.uniform(1, 9, 6), rng.uniform(1, 9, 6), rng.uniform(1, 2, 6)
        law, rms = fit_law(list(sizes), list(data), list(losses))
        factors = np.array([law.size_factor, law.data_factor, law.floor])
        terms = np.stack([sizes**-0.34, data**-0.28, np.ones(6)])
        assert factors.min() >= 0
        slope = terms @ (factors @ terms - losses)  # of the squared error: 0 where a factor is free, else not negative
        assert slope.min() > -1e-9
        assert slope[factors > 0] == pytest.approx(0.0, abs=1e-9)
        assert rms == pytest.approx(math.sqrt(np.mean((factors @ terms - losses) ** 2)))


#: The eight models of the release, in 1e9: average size, final and initial size, tokens, and the final training loss.
PRUNED = [(1.02, 0.91, 1.14, 89.6, 2.133), (0.87, 0.68, 1.14, 104.4, 2.137)]
PRUNED += [(0.69, 0.46, 1.14, 131.0, 2.182), (0.45, 0.23, 1.14, 200.4, 2.228)]
DENSE = [(1.02, 89.6, 2.139), (0.87, 104.4, 2.161), (0.69, 131.0, 2.209), (0.45, 200.4, 2.237)]


def published(column: int) -> float:
    """The error of a law that takes a column for the size of pruned models."""
    sizes = [1e9 * row[column] for row in PRUNED] + [1e9 * row[0] for row in DENSE]
    data = [1e9 * row[3] for row in PRUNED] + [1e9 * row[1] for row in DENSE]
    return fit_law(sizes, data, [row[4] for row in PRUNED] + [row[2] for row in DENSE])[1]


def test_the_average_size_explains_the_published_losses_and_neither_the_final_nor_the_initial_size_does() -> None:
    average, final, initial = map(published, range(3))
    assert average < 0.016  # the mean error that the paper reports of its own fit
    assert final > 2 * average
    assert initial > 2 * average


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_losses_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="at least 4"):
        fit_law([1.0] * count, [1.0] * count, [1.0] * count)
