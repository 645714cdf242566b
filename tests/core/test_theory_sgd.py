"""Every formula of theory.py against brute force, an exact recursion or a fit."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distgrow.theory.sgd import (
    Constants,
    bound,
    bounds,
    cost_of_wrong_batch,
    critical_batch,
    exponent,
    least_sfo,
    optimal_sample_ratio,
    optimal_steps_ratio,
    sfo_to,
    steps_to,
)

positive = st.floats(0.01, 100)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Constants, float, float]:
    """(constants, a stable learning rate, ε)."""
    constants = Constants(smoothness=draw(positive), variance=draw(positive), gap=draw(positive))
    return constants, draw(st.floats(0.01, 0.95)) * constants.stable_lr(), draw(st.floats(0.01, 1))


def staged(growth: float, lr_factor: float, steps_factor: float, stages: int) -> list[tuple[int, float, int]]:
    """(updates, lr, batch) of a long staged schedule, large enough that rounding to integers does not matter."""
    return [
        (round(10**6 * steps_factor**m), 1e-3 * lr_factor**m, round(10**6 * growth**m)) for m in range(stages)
    ]  # fmt: skip


def measured_exponent(growth: float, lr_factor: float, steps_factor: float, stages: int = 300) -> float:
    """−d ln N / d ln ε along the last third of a long staged schedule whose learning rates stay far below 2/L."""
    runs = staged(growth, lr_factor, steps_factor, stages)
    constants = Constants(smoothness=1e-80, variance=1e80, gap=1.0)
    ends = range(2 * stages // 3, stages, 10)
    sfo = [math.log(sum(count * batch for count, _, batch in runs[:end])) for end in ends]
    epsilon = [math.log(bound(constants, runs[:end])) / 2 for end in ends]
    return -float(np.polyfit(epsilon, sfo, 1)[0])


# ── the constant batch ──────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(problems(), st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_bound_of_a_constant_schedule_is_c1_over_t_plus_c2_over_b(
    problem: tuple[Constants, float, float], steps: int, batch: int
) -> None:
    constants, lr, _ = problem
    c1 = 2 * constants.gap / ((2 - constants.smoothness * lr) * lr)
    c2 = constants.smoothness * lr * constants.variance / (2 - constants.smoothness * lr)
    assert constants.c1(lr) == pytest.approx(c1, rel=1e-12)
    assert constants.c2(lr) == pytest.approx(c2, rel=1e-12)
    assert bound(constants, [(steps, lr, batch)]) == pytest.approx(c1 / steps + c2 / batch, rel=1e-9)


@settings(deadline=None)
@given(problems(), st.floats(0.51, 50))
def test_after_the_steps_and_sfo_predicted_the_bound_is_the_target(
    problem: tuple[Constants, float, float], ratio: float
) -> None:
    constants, lr, epsilon = problem
    batch = ratio * critical_batch(constants, lr, epsilon)
    steps = steps_to(constants, lr, batch, epsilon)
    assert constants.c1(lr) / steps + constants.c2(lr) / batch == pytest.approx(epsilon**2, rel=1e-9)
    assert sfo_to(constants, lr, batch, epsilon) == pytest.approx(batch * steps, rel=1e-12)


@settings(deadline=None)
@given(problems())
def test_no_batch_of_a_fine_grid_costs_less_than_the_critical_one(problem: tuple[Constants, float, float]) -> None:
    constants, lr, epsilon = problem
    best, least = critical_batch(constants, lr, epsilon), least_sfo(constants, lr, epsilon)
    grid = best * np.geomspace(0.5001, 100, 4001)
    costs = sfo_to(constants, lr, grid, epsilon)
    assert min(costs) >= least * (1 - 1e-9)
    assert grid[int(np.argmin(costs))] == pytest.approx(best, rel=2e-3)
    assert sfo_to(constants, lr, best, epsilon) == pytest.approx(least, rel=1e-9)


@settings(deadline=None)
@given(problems(), st.floats(0.51, 100))
def test_the_cost_of_a_wrong_batch_is_the_ratio_of_the_costs(
    problem: tuple[Constants, float, float], ratio: float
) -> None:
    constants, lr, epsilon = problem
    cost = sfo_to(constants, lr, ratio * critical_batch(constants, lr, epsilon), epsilon)
    assert cost / least_sfo(constants, lr, epsilon) == pytest.approx(cost_of_wrong_batch(ratio), rel=1e-6)
    assert cost_of_wrong_batch(ratio) >= 1


@settings(deadline=None)
@given(problems(), st.floats(0.001, 0.499))
def test_half_the_critical_batch_never_arrives(problem: tuple[Constants, float, float], ratio: float) -> None:
    constants, lr, epsilon = problem
    batch = ratio * critical_batch(constants, lr, epsilon)
    assert cost_of_wrong_batch(ratio) == steps_to(constants, lr, batch, epsilon) == math.inf
    assert sfo_to(constants, lr, batch, epsilon) == math.inf
    assert bound(constants, [(10**15, lr, max(1, math.floor(batch)))]) > epsilon**2 or batch < 1
    assert cost_of_wrong_batch(0.5) == math.inf


@given(st.floats(0.01, 100), st.sampled_from([0.0, -0.1, 1.0, 1.5, math.nan]))
def test_unstable_learning_rates_have_no_constants(smoothness: float, share: float) -> None:
    constants = Constants(smoothness=smoothness, variance=1.0, gap=1.0)
    with pytest.raises(ValueError, match="must lie between 0 and 2/L"):
        constants.c1(share * 2 / smoothness)
    with pytest.raises(ValueError, match="must lie between 0 and 2/L"):
        constants.c2(share * 2 / smoothness)


# ── the bound of any schedule ───────────────────────────────────────────────────────────────────────────────────

schedules = st.lists(st.tuples(st.integers(1, 200), st.floats(0.001, 0.99), st.integers(1, 500)), min_size=1)


@settings(deadline=None)
@given(schedules, positive, positive, positive)
def test_no_schedule_beats_the_universal_lower_bound(
    shares: list[tuple[int, float, int]], smoothness: float, variance: float, gap: float
) -> None:
    constants = Constants(smoothness=smoothness, variance=variance, gap=gap)
    runs = [(count, share * 2 / smoothness, batch) for count, share, batch in shares]
    sfo, margin = sum(count * batch for count, _, batch in runs), 2 - smoothness * max(lr for _, lr, _ in runs)
    least = 8 * gap * smoothness * variance / (margin**2 * bound(constants, runs) ** 2)
    assert sfo >= least * (1 - 1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 40)), min_size=1, max_size=8), positive, positive)
def test_the_universal_lower_bound_is_reached_where_the_batch_follows_the_learning_rate(
    runs_of: list[tuple[int, int]], variance: float, gap: float
) -> None:
    smoothness, temperature = 1.0, 1e-3
    runs = [(count, temperature * batch, batch) for count, batch in runs_of]
    sfo = sum(count * batch for count, _, batch in runs)
    margin = 2 - smoothness * max(lr for _, lr, _ in runs)
    # the gap at which noise and gap weigh the same, which the best length for that gap makes them
    gap = smoothness * variance * temperature**2 * sfo / 2
    constants = Constants(smoothness=smoothness, variance=variance, gap=gap)
    least = 8 * gap * smoothness * variance / (margin**2 * bound(constants, runs) ** 2)
    assert sfo == pytest.approx(least, rel=1e-9)


@settings(deadline=None)
@given(schedules, positive, positive, positive)
def test_the_bound_holds_on_a_noisy_quadratic_solved_exactly(
    shares: list[tuple[int, float, int]], smoothness: float, variance: float, square: float
) -> None:
    runs = [(count, share * 2 / smoothness, batch) for count, share, batch in shares]
    least, distance = math.inf, square  # E‖θ‖² of SGD on L‖θ‖²/2
    for count, lr, batch in runs:
        for _ in range(count):
            least = min(least, smoothness**2 * distance)
            distance = (1 - lr * smoothness) ** 2 * distance + lr**2 * variance / batch
    constants = Constants(smoothness=smoothness, variance=variance, gap=smoothness * square / 2)
    assert least <= bound(constants, runs) * (1 + 1e-9)


@given(schedules)
def test_the_bound_does_not_depend_on_how_runs_are_cut(runs: list[tuple[int, float, int]]) -> None:
    constants = Constants(smoothness=1.0, variance=2.0, gap=3.0)
    one_by_one = [(1, lr, batch) for count, lr, batch in runs for _ in range(count)]
    assert bound(constants, runs) == pytest.approx(bound(constants, one_by_one), rel=1e-9)


@given(schedules)
def test_the_curve_of_a_schedule_is_the_bound_after_each_run(runs: list[tuple[int, float, int]]) -> None:
    constants, lr_sum, noise, curve = Constants(smoothness=1.0, variance=2.0, gap=3.0), 0.0, 0.0, []
    for index, (count, lr, batch) in enumerate(runs):
        lr_sum, noise = lr_sum + count * lr, noise + count * lr**2 / batch
        curve.append((6 + 2 * noise) / ((2 - max(lr for _, lr, _ in runs[: index + 1])) * lr_sum))
    assert bounds(constants, runs) == pytest.approx(curve, rel=1e-9)


@pytest.mark.parametrize("run", [(1, 0.1, 0), (1, -0.1, 8), (-1, 0.1, 8)])
def test_a_run_that_cannot_be_has_no_bound(run: tuple[int, float, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        bound(Constants(smoothness=1.0, variance=1.0, gap=1.0), [run])


def test_the_bound_is_infinite_before_the_first_update_and_from_an_unstable_one_on() -> None:
    constants = Constants(smoothness=1.0, variance=1.0, gap=1.0)
    assert bound(constants, []) == bound(constants, [(0, 0.1, 8)]) == math.inf
    assert list(bounds(constants, [(100, 0.1, 8), (1, 2.0, 8), (1, 0.1, 8)]))[1:] == [math.inf, math.inf]
    assert bound(constants, [(100, 0.1, 8), (1, 2.0, 8)]) == math.inf
    assert bound(constants, [(100, 0.1, 8), (1, 1.99, 8)]) < math.inf


# ── staged growth ───────────────────────────────────────────────────────────────────────────────────────────────

factors = st.floats(1.05, 4)


@pytest.mark.parametrize(("growth", "lr_factor", "steps_factor"), [(1, 1, 1), (0.5, 1, 1), (2, 0, 1), (2, 1, -1)])
def test_factors_without_growth_have_no_exponent(growth: float, lr_factor: float, steps_factor: float) -> None:
    with pytest.raises(ValueError, match="must be above"):
        exponent(growth, lr_factor, steps_factor)


@given(factors, st.floats(1, 4), st.floats(0.5, 8))
def test_the_exponent_is_at_least_four(growth: float, lr_factor: float, steps_factor: float) -> None:
    assert exponent(growth, lr_factor, steps_factor) >= 4 - 1e-9


@given(factors, st.floats(0, 0.95))
def test_the_exponent_is_four_at_the_optimal_stage_lengths(growth: float, power: float) -> None:
    lr_factor = growth**power
    steps_factor = growth / lr_factor**2
    assume(steps_factor * lr_factor > 1 + 1e-3)
    assert optimal_steps_ratio(growth, lr_factor) == pytest.approx(steps_factor, rel=1e-12)
    assert optimal_sample_ratio(growth, lr_factor) == pytest.approx(steps_factor * growth, rel=1e-12)
    assert exponent(growth, lr_factor, steps_factor) == pytest.approx(4, rel=1e-6)


@given(factors, st.floats(0, 0.95), st.sampled_from([0.8, 0.9, 1.1, 1.3]))
def test_the_exponent_is_above_four_at_all_other_stage_lengths(growth: float, power: float, off: float) -> None:
    lr_factor = growth**power
    assert exponent(growth, lr_factor, off * growth / lr_factor**2) > 4 + 1e-6


@pytest.mark.parametrize(("lr_factor", "known"), [(1.1, 14.5), (1.2, 7.6), (1.3, 5.3), (1.4, 4.12), (1.6, 6.2)])
def test_doubling_with_constant_steps_has_the_known_exponents(lr_factor: float, known: float) -> None:
    assert exponent(2, lr_factor, 1) == pytest.approx(known, abs=0.06)


@pytest.mark.parametrize(
    ("growth", "lr_factor", "steps_factor"),
    [(2, 1.1, 1), (2, 1.2, 1), (2, 1.3, 1), (2, 1.4, 1), (2, 1.6, 1)]
    + [(2, 1, 1.5), (2, 1, 3), (3, 1.2, 1.5), (1.5, 1.3, 1)],
)
def test_the_exponent_is_the_slope_of_a_staged_schedule(growth: float, lr_factor: float, steps_factor: float) -> None:
    assert measured_exponent(growth, lr_factor, steps_factor) == pytest.approx(
        exponent(growth, lr_factor, steps_factor), rel=0.02
    )


@pytest.mark.parametrize(("growth", "lr_factor"), [(2, math.sqrt(2)), (2, 1), (3, 1.3)])
def test_optimal_stages_have_slope_four_but_for_a_logarithm(growth: float, lr_factor: float) -> None:
    steps_factor = optimal_steps_ratio(growth, lr_factor)
    assert 4 <= measured_exponent(growth, lr_factor, steps_factor) < 4.1


@pytest.mark.parametrize(
    ("growth", "lr_factor", "off"), [(2, math.sqrt(2), 1.4), (2, 1, 0.7), (2, 1, 1.4), (3, 1.3, 0.7), (3, 1.3, 1.4)]
)
def test_other_stage_lengths_have_a_steeper_slope(growth: float, lr_factor: float, off: float) -> None:
    assert measured_exponent(growth, lr_factor, off * optimal_steps_ratio(growth, lr_factor)) > 4.2


@pytest.mark.parametrize(("lr_factor", "steps_factor"), [(1, 0.5), (1.4, 0.5), (2, 1), (1, 1), (2.5, 1)])
def test_schedules_whose_bound_has_a_floor_have_no_exponent(lr_factor: float, steps_factor: float) -> None:
    assert exponent(2, lr_factor, steps_factor) == math.inf
    constants = Constants(smoothness=1e-60, variance=1e60, gap=1.0)
    stages = [(10**6 * steps_factor**m, 1e-3 * lr_factor**m, 10**6 * 2**m) for m in range(100)]
    runs = [(max(1, round(10**34 * count)), lr, batch) for count, lr, batch in stages]
    assert bound(constants, runs) > 0.01 * bound(constants, runs[:50])
