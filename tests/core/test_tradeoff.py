"""A/K + B/b + C, the best learning rate of a batch and the table of constants, against brute force."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow.theory.sgd import (
    Constants,
    Tradeoff,
    best_lr,
    bound,
    cost_of_wrong_batch,
    critical_batch,
    critical_steps,
    least_sfo,
    measured_critical_batch,
    sfo_at_best_lr,
    sfo_table,
    sfo_to,
    steps_to,
)

positive = st.floats(0.01, 100)
problems = st.builds(Constants, smoothness=positive, variance=positive, gap=positive)


def first_update(a: float, b: float, c: float, batch: float, target: float) -> int:
    """The first K at which A/K + B/b + C is at most the target, found by bisection of the sum itself."""
    low, high = 0, 2**60
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if a / middle + b / batch + c <= target else (middle, high)
    return high


# ── momentum and Adam: A/K + B/b + C ────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(st.floats(1e3, 1e5), positive, st.floats(0, 5), st.floats(0.01, 1), st.floats(1.01, 50))
def test_the_updates_of_adam_are_the_first_at_which_its_bound_is_the_target(
    a: float, b: float, c: float, room: float, ratio: float
) -> None:
    batch = ratio * b / room
    updates = Tradeoff(a=a, b=b, c=c).steps_to(batch, c + room)
    assert first_update(a, b, c, batch, c + room) == pytest.approx(updates, rel=1e-6, abs=1.001)


@settings(deadline=None)
@given(st.floats(1e3, 1e5), positive, st.floats(0, 5), st.floats(0.01, 1))
def test_no_batch_costs_adam_less_than_its_critical_one(a: float, b: float, c: float, room: float) -> None:
    tradeoff, grid = Tradeoff(a=a, b=b, c=c), b / room * np.geomspace(1.01, 100, 2001)
    costs = grid * a / (c + room - c - b / grid)
    best = tradeoff.critical_batch(c + room)
    assert grid[int(np.argmin(costs))] == pytest.approx(best, rel=5e-3)
    assert tradeoff.least_sfo(c + room) == pytest.approx(costs.min(), rel=1e-4)
    assert tradeoff.critical_steps(c + room) * best == pytest.approx(costs.min(), rel=1e-4)
    assert tradeoff.sfo_to(grid, c + room) == pytest.approx(costs, rel=1e-6)


def test_a_target_at_the_floor_of_adams_bound_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target=0\.5 must be above the bound's floor C=0\.5"):
        Tradeoff(a=1.0, b=1.0, c=0.5).critical_batch(0.5)


def test_a_batch_too_small_for_the_target_never_arrives() -> None:
    assert list(Tradeoff(a=1.0, b=1.0).steps_to(np.array([1.0, 2.0, 4.0]), 0.5)) == [math.inf, math.inf, 4.0]


@pytest.mark.parametrize(("a", "b", "c"), [(900.0, 3.0, 0.0), (5e4, 0.2, 0.7)])
def test_the_critical_batch_is_read_off_runs_whose_constants_are_unknown(a: float, b: float, c: float) -> None:
    target, batches = c + 0.05, [ratio * b / 0.05 for ratio in (1.3, 2, 3, 6, 20)]
    steps = [first_update(a, b, c, batch, target) for batch in batches]
    grid = b / 0.05 * np.geomspace(1.1, 10, 400)
    costs = [batch * first_update(a, b, c, batch, target) for batch in grid]
    assert measured_critical_batch(batches, steps) == pytest.approx(grid[int(np.argmin(costs))], rel=0.03)


@pytest.mark.parametrize(
    ("batches", "steps", "why"),
    [
        ([8, 16], [100, 100], "no critical batch"),
        ([8, 16], [100, 120], "no critical batch"),
        ([8, 8], [100, 90], "two batches that differ"),
        ([8, 16], [100], "one length"),
        ([8, 16], [100, 0], "steps=.* must be above 0"),
    ],
)
def test_runs_that_show_no_critical_batch_are_refused(batches: list[float], steps: list[float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        measured_critical_batch(batches, steps)


# ── SGD at the best learning rate of each batch ─────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(problems, st.floats(0.5, 1000), st.floats(0.05, 2))
def test_no_learning_rate_of_a_fine_grid_costs_less_than_the_best_one(
    constants: Constants, batch: float, epsilon: float
) -> None:
    grid = np.geomspace(1e-7, 0.9999, 6001) * 2 / constants.smoothness
    margin = epsilon**2 * (2 - constants.smoothness * grid) * grid - (
        constants.smoothness * constants.variance * grid**2 / batch
    )
    costs = np.where(margin > 0, 2 * constants.gap * batch / np.where(margin > 0, margin, 1), math.inf)
    lr, least = best_lr(constants, batch, epsilon), sfo_at_best_lr(constants, batch, epsilon)
    assert lr < 1 / constants.smoothness
    assert costs.min() == pytest.approx(least, rel=1e-3)
    assert costs.min() >= least * (1 - 1e-9)
    assert bound(constants, [(least / batch, lr, batch)]) == pytest.approx(epsilon**2, rel=1e-6)


@settings(deadline=None)
@given(problems, positive, st.floats(0.05, 2))
def test_at_the_best_learning_rate_twice_the_least_sfo_buys_a_batch_of_one_noise_scale(
    constants: Constants, batch: float, epsilon: float
) -> None:
    scale = constants.variance / epsilon**2
    tiny, large = 1e-6 * scale, 1e6 * scale
    least = sfo_at_best_lr(constants, tiny, epsilon)
    fewest = sfo_at_best_lr(constants, large, epsilon) / large
    sfo = sfo_at_best_lr(constants, batch, epsilon)
    assert sfo / least == pytest.approx(1 + batch / scale, rel=1e-5)
    assert sfo / batch / fewest == pytest.approx(1 + scale / batch, rel=1e-5)


def test_the_table_of_constants_holds_every_pair_and_its_least_is_at_the_best_learning_rate() -> None:
    constants, epsilon = Constants(smoothness=2.0, variance=30.0, gap=1.5), 0.1
    lrs, batches = np.geomspace(1e-3, 0.99, 300), [32.0, 1024.0, 65536.0]
    table = sfo_table(constants, list(lrs), batches, epsilon)
    assert table.shape == (300, 3)
    for row in (0, 150, 299):
        for column, batch in enumerate(batches):
            updates = table[row, column] / batch
            reached = bound(constants, [(updates if updates < math.inf else 1e18, float(lrs[row]), batch)])
            assert reached == pytest.approx(epsilon**2, rel=1e-9) if updates < math.inf else reached > epsilon**2
    for column, batch in enumerate(batches):
        assert lrs[int(np.argmin(table[:, column]))] == pytest.approx(best_lr(constants, batch, epsilon), rel=0.03)


@settings(deadline=None)
@given(problems, st.floats(0.01, 0.95), st.floats(0.01, 1))
def test_the_critical_batch_and_its_updates_make_the_least_sfo(
    constants: Constants, share: float, epsilon: float
) -> None:
    lr = share * constants.stable_lr()
    least = 8 * constants.gap * constants.smoothness * constants.variance / ((2 - 2 * share) ** 2 * epsilon**4)
    assert least_sfo(constants, lr, epsilon) == pytest.approx(least, rel=1e-9)
    assert critical_batch(constants, lr, epsilon) * critical_steps(constants, lr, epsilon) == pytest.approx(least)


# ── arrays and errors ───────────────────────────────────────────────────────────────────────────────────────────


def test_an_array_of_batches_gives_an_array_and_a_float_a_float() -> None:
    constants, batches = Constants(smoothness=2.0, variance=30.0, gap=1.5), np.array([10.0, 1e3, 1e5])
    for formula in (steps_to, sfo_to):
        values = formula(constants, 0.1, batches, 0.1)
        assert list(values) == [formula(constants, 0.1, float(batch), 0.1) for batch in batches]
        assert type(formula(constants, 0.1, 1e3, 0.1)) is float
    assert cost_of_wrong_batch(np.array([0.4, 0.5, 1, 2])) == pytest.approx([math.inf, math.inf, 1, 4 / 3])


@pytest.mark.parametrize("epsilon", [0.0, -0.1, math.nan])
def test_a_target_that_is_not_above_zero_is_refused(epsilon: float) -> None:
    constants = Constants(smoothness=1.0, variance=1.0, gap=1.0)
    for formula in (critical_batch, critical_steps, least_sfo):
        with pytest.raises(ValueError, match="epsilon=.* must be above 0"):
            formula(constants, 0.1, epsilon)
    for formula in (steps_to, sfo_to):
        with pytest.raises(ValueError, match="epsilon=.* must be above 0"):
            formula(constants, 0.1, 8.0, epsilon)


@pytest.mark.parametrize("key", ["smoothness", "variance", "gap"])
def test_constants_that_are_not_above_zero_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}=0 must be above 0"):
        Constants(**{"smoothness": 1.0, "variance": 1.0, "gap": 1.0, key: 0})


@pytest.mark.parametrize("batch", [0.0, -8.0])
def test_a_batch_that_is_not_above_zero_is_refused(batch: float) -> None:
    constants = Constants(smoothness=1.0, variance=1.0, gap=1.0)
    with pytest.raises(ValueError, match="batch=.* must be above 0"):
        steps_to(constants, 0.1, batch, 0.1)
    with pytest.raises(ValueError, match="ratio=.* must be above 0"):
        cost_of_wrong_batch(batch)
