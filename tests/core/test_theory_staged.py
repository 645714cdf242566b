"""Staged growth's closed forms against sums of explicit schedules, grid searches and exact recursions."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distgrow.theory.sgd import Constants, bound
from distgrow.theory.staged import (
    Staged,
    critical_threshold,
    geometric_sum,
    increase,
    optimal_stage_shares,
    optimal_staged,
    published_threshold,
    seesaw,
    serial_ratio,
    sfo_ratio,
)

SMALL_STEPS = Constants(smoothness=1e-80, variance=3e80, gap=2.0)  # Lη far below 2 at every stage, Lσ² = 3
ROOT = math.sqrt(2)


def explicit(schedule: Staged, stages: int) -> list[tuple[float, float, float]]:
    """(updates, lr, batch) of every stage."""
    return [
        (
            schedule.steps * schedule.steps_factor**m,
            schedule.lr * schedule.lr_factor**m,
            schedule.batch * schedule.growth**m,
        )
        for m in range(stages)
    ]


def cheapest(growth: float, lr_factor: float, steps_factor: float, stages: int) -> tuple[float, float]:
    """(SFO, updates) of the cheapest (b₀, T₀) of a fine grid that brings the bound to ε = 0.1 at η₀ = 1."""
    powers = np.arange(stages)
    lr_sum = (steps_factor * lr_factor) ** powers @ np.ones(stages)
    noise = 3 * ((steps_factor * lr_factor**2 / growth) ** powers).sum()
    batch = np.geomspace(1, 1e8, 400_001)
    margin = 2 * lr_sum * 0.1**2 - noise / batch  # times T₀ this has to be 2Δ
    steps = np.where(margin > 0, 2 * 2.0 / np.where(margin > 0, margin, 1), math.inf)
    sfo = batch * steps * ((steps_factor * growth) ** powers).sum()
    best = int(np.argmin(sfo))
    return float(sfo[best]), float(steps[best] * (steps_factor**powers).sum())


# ── a schedule's sums ───────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(st.floats(1.1, 3), st.floats(0.5, 1.5), st.floats(0.4, 3), st.integers(1, 12))
def test_a_staged_schedule_adds_up_to_its_stages(growth: float, lr_factor: float, tau: float, stages: int) -> None:
    schedule = Staged(batch=8, lr=1e-3, steps=50, growth=growth, lr_factor=lr_factor, steps_factor=tau)
    constants, runs = Constants(smoothness=2.0, variance=5.0, gap=1.0), explicit(schedule, stages)
    assert schedule.updates(float(stages)) == pytest.approx(sum(count for count, _, _ in runs), rel=1e-9)
    assert schedule.sfo(float(stages)) == pytest.approx(sum(count * batch for count, _, batch in runs), rel=1e-9)
    lr_sum, noise = sum(count * lr for count, lr, _ in runs), sum(count * lr**2 / batch for count, lr, batch in runs)
    expected = (2 + 10 * noise) / ((2 - 2 * max(lr for _, lr, _ in runs)) * lr_sum)
    assert schedule.bound(constants, float(stages)) == pytest.approx(expected, rel=1e-9)


@given(st.floats(0.1, 3), st.integers(0, 20))
def test_a_geometric_sum_is_the_sum_of_its_powers(ratio: float, count: int) -> None:
    assert geometric_sum(ratio, float(count)) == pytest.approx(math.fsum(ratio**k for k in range(count)), rel=1e-9)
    assert geometric_sum(ratio, math.inf) == pytest.approx(1 / (1 - ratio) if ratio < 1 else math.inf)


def test_an_array_of_stages_gives_the_curve_of_a_schedule() -> None:
    schedule, stages = Staged(batch=8, lr=0.1, steps=50, lr_factor=ROOT), np.arange(1.0, 12)
    constants = Constants(smoothness=1.0, variance=5.0, gap=1.0)
    expected = [bound(constants, explicit(schedule, int(count))) for count in stages]
    assert schedule.bound(constants, stages) == pytest.approx(expected, rel=1e-9)
    assert expected[-1] == math.inf  # 0.1·√2^10 is above 2/L


# ── floors ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("growth", "lr_factor", "steps_factor"),
    [(2, 1, 0.5), (2, ROOT, 0.5), (2, 1.9, 0.5), (3, 1.5, 0.4), (2, 0.7, 1), (2, 2, 1), (2, 2, 0.4), (3, 3, 2)],
)
def test_a_schedule_with_a_floor_comes_down_to_it_and_no_further(
    growth: float, lr_factor: float, steps_factor: float
) -> None:
    schedule = Staged(batch=10, lr=0.1, steps=30, growth=growth, lr_factor=lr_factor, steps_factor=steps_factor)
    floor = schedule.floor(SMALL_STEPS)
    curve = [bound(SMALL_STEPS, explicit(schedule, stages)) for stages in (1, 5, 20, 100)]
    assert curve[-1] == pytest.approx(floor, rel=0.01)
    assert min(curve) >= floor * (1 - 1e-9) > 0


def test_the_floor_of_linear_scaling_is_the_noise_of_its_first_stage() -> None:
    linear = Staged(batch=10, lr=0.1, steps=30, growth=2, lr_factor=2)
    assert linear.floor(SMALL_STEPS) == pytest.approx(3 * 0.1 / 10 / 2)


@pytest.mark.parametrize("lr_factor", [1, 0.8])
def test_the_floor_holds_near_the_stable_learning_rate_too(lr_factor: float) -> None:
    constants = Constants(smoothness=1.0, variance=3.0, gap=2.0)
    schedule = Staged(batch=10, lr=1.6, steps=30, lr_factor=lr_factor, steps_factor=0.5)
    assert schedule.floor(constants) == pytest.approx(bound(constants, explicit(schedule, 60)), rel=1e-9)


@pytest.mark.parametrize(("lr_factor", "steps_factor"), [(1, 1), (1, 2), (ROOT, 1), (ROOT, 0.8), (1.9, 1)])
def test_a_schedule_without_a_floor_comes_below_any_target(lr_factor: float, steps_factor: float) -> None:
    schedule = Staged(batch=10, lr=0.1, steps=30, lr_factor=lr_factor, steps_factor=steps_factor)
    assert schedule.floor(SMALL_STEPS) == 0
    curve = [bound(SMALL_STEPS, explicit(schedule, stages)) for stages in (10, 40, 160)]
    assert curve[0] > 2 * curve[1] > 4 * curve[2]


def test_a_learning_rate_that_outgrows_the_batch_has_no_floor_but_a_rising_bound() -> None:
    with pytest.raises(ValueError, match=r"lr_factor=2.5 must not be above growth=2"):
        Staged(batch=10, lr=0.1, steps=30, lr_factor=2.5).floor(SMALL_STEPS)


# ── against the best constant ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("growth", "lr_factor"), [(2, ROOT), (2, 1), (2, 1.2), (2, 1.7), (3, 1.5), (2, 2)])
@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_optimal_stages_cost_what_a_grid_search_finds(growth: float, lr_factor: float, stages: int) -> None:
    steps_factor = growth / lr_factor**2
    sfo, updates = cheapest(growth, lr_factor, steps_factor, stages)
    constant_sfo, constant_updates = cheapest(growth, 1, 1, 1)
    assert sfo_ratio(growth, lr_factor, float(stages)) == pytest.approx(sfo / constant_sfo, rel=1e-3)
    assert serial_ratio(growth, lr_factor, float(stages)) == pytest.approx(updates / constant_updates, rel=1e-3)
    best = optimal_staged(SMALL_STEPS, 1.0, 0.1, growth, lr_factor, stages)
    assert bound(SMALL_STEPS, explicit(best, stages)) == pytest.approx(0.01, rel=1e-9)
    assert best.sfo(float(stages)) == pytest.approx(sfo, rel=1e-3)


def test_the_known_ratios_of_sfo_and_serial_steps() -> None:
    assert sfo_ratio(2, ROOT, np.array([4.0, 8.0])) == pytest.approx([1.14, 1.56], abs=0.005)
    assert serial_ratio(2, ROOT, np.array([4.0, 8.0])) == pytest.approx([0.55, 0.22], abs=0.005)


@given(st.floats(1.05, 4), st.floats(0, 1), st.integers(1, 20))
def test_growth_never_beats_the_best_constant_for_a_known_target_in_sfo(
    growth: float, power: float, stages: int
) -> None:
    assert sfo_ratio(growth, growth**power, float(stages)) >= 1 - 1e-9


@given(st.floats(1.05, 4), st.floats(0, 1), st.integers(1, 20))
def test_nor_in_serial_steps_if_the_constant_may_use_the_largest_learning_rate(
    growth: float, power: float, stages: int
) -> None:
    lr_factor = growth**power
    assert serial_ratio(growth, lr_factor, float(stages), lr_factor ** (stages - 1)) >= 1 - 1e-9


@given(st.floats(1.05, 4), st.integers(1, 12))
def test_at_a_constant_learning_rate_growth_takes_exactly_the_constants_serial_steps(
    growth: float, stages: int
) -> None:
    assert serial_ratio(growth, 1, float(stages)) == pytest.approx(1, rel=1e-9)


def test_optimal_stages_that_would_pass_the_stable_learning_rate_are_refused() -> None:
    constants = Constants(smoothness=1.0, variance=1.0, gap=1.0)
    with pytest.raises(ValueError, match="must lie between 0 and 2/L"):
        optimal_staged(constants, 0.5, 0.1, 2, ROOT, 5)
    assert optimal_staged(constants, 0.5, 0.1, 2, ROOT, 4).steps > 0


# ── stage lengths and thresholds ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("lr_factor", "shares"), [(1, [1, 4, 16]), (ROOT, [1, 2, 4]), (2, [1, 1, 1]), (4, [4, 1, 0.25])]
)
def test_the_optimal_shares_of_doubling_are_known_powers(lr_factor: float, shares: list[float]) -> None:
    assert optimal_stage_shares(2, lr_factor, 3) == pytest.approx(np.array(shares) / sum(shares), rel=1e-12)


@pytest.mark.parametrize("lr_factor", [1.0, 4.0])
def test_the_shares_of_very_many_stages_still_sum_to_one(lr_factor: float) -> None:
    assert optimal_stage_shares(2, lr_factor, 5000).sum() == pytest.approx(1, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.floats(1.1, 4), st.floats(0, 1), st.integers(1, 10))
def test_at_its_threshold_each_stages_batch_is_as_critical_as_the_first(
    growth: float, power: float, stage: int
) -> None:
    lr_factor, smoothness = growth**power, 1e-9

    def critical(lr: float, epsilon: float) -> float:
        batch = np.geomspace(1e-12, 1e6, 200_001)
        margin = epsilon**2 * batch - smoothness * lr / (2 - smoothness * lr)
        return float(batch[np.argmin(np.where(margin > 0, batch**2 / np.where(margin > 0, margin, 1), math.inf))])

    epsilon = critical_threshold(1e-3, growth, lr_factor, float(stage))
    grown = critical(0.1 * lr_factor**stage, epsilon) / critical(0.1, 1e-3)
    assert grown == pytest.approx(growth**stage, rel=2e-3)


@given(st.floats(1.1, 4), st.integers(0, 12))
def test_the_published_thresholds_are_the_critical_ones_at_a_constant_learning_rate(growth: float, stage: int) -> None:
    published = published_threshold(0.5, growth**stage)
    assert published == pytest.approx(critical_threshold(0.5, growth, 1, float(stage)), rel=1e-9)


# ── growth in place of decay ────────────────────────────────────────────────────────────────────────────────────


def excess(lr: float, batch: float, samples: float, normalised: bool) -> float:
    """E f of (normalised) SGD on θ²/2 with noise of variance 1 a sample, from 1; normalised where noise dominates."""
    step = lr * math.sqrt(batch) if normalised else lr
    square = 1.0
    for _ in range(round(samples / batch)):
        square = (1 - step) ** 2 * square + step**2 / batch
    return square / 2


@settings(deadline=None, max_examples=20)
@given(st.floats(1.2, 4), st.floats(2e3, 3e4))
def test_seesaw_walks_normalised_sgd_along_the_decayed_path(decay: float, samples: float) -> None:
    lr_factor, batch_factor = seesaw(decay)
    decayed = excess(1e-3 / decay, 4, samples, normalised=True)
    grown = excess(1e-3 * lr_factor, 4 * batch_factor, samples, normalised=True)
    assert grown == pytest.approx(decayed, rel=0.02)


def test_growth_by_the_whole_decay_leaves_normalised_sgd_at_more_noise_by_its_root() -> None:
    lr_factor, batch_factor = increase(4)
    decayed, grown = excess(1e-3 / 4, 4, 1e5, True), excess(1e-3 * lr_factor, 4 * batch_factor, 1e5, True)
    assert grown / decayed == pytest.approx(2, rel=0.02)


@settings(deadline=None, max_examples=20)
@given(st.floats(1.2, 4), st.floats(2e3, 3e4))
def test_a_larger_batch_walks_sgd_along_the_decayed_path(decay: float, samples: float) -> None:
    lr_factor, batch_factor = increase(decay)
    decayed = excess(4e-3 / decay, 4, samples, normalised=False)
    grown = excess(4e-3 * lr_factor, 4 * batch_factor, samples, normalised=False)
    assume(decayed > 1e-12)
    assert grown == pytest.approx(decayed, rel=0.02)


@pytest.mark.parametrize("rule", [seesaw, increase])
def test_a_decay_that_does_not_decay_is_refused(rule: Callable[[float], object]) -> None:
    with pytest.raises(ValueError, match="decay=1 must be above 1"):
        rule(1)
