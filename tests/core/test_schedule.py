"""Schedules are the closed forms that they name, to the sample."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triggers import ends

from distgrow import (
    batches,
    budget,
    constant,
    every,
    exponential,
    increase,
    late,
    linear,
    optimal,
    seesaw,
    tau_nice_batch,
)
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Constant, Factor, Power, Span, StepDecay
from distgrow.core.progress import Progress
from distgrow.core.stages import Every, Stages
from distgrow.growth import Growth
from distgrow.growth.base import check_settings
from distgrow.growth.tau_nice import TauNice
from distgrow.theory.finite_sum import FiniteSum

starts = st.integers(1, 500)
stages = st.integers(0, 12)
factors = st.fractions(Fraction(21, 20), Fraction(4), max_denominator=20)
SPAN = Span(samples=10_000, epoch=100)


def first_reached(growth: Growth, batch: int) -> int:
    """The first stage whose batch is `batch`, by trying."""
    return next(stage for stage in range(10_000) if growth.stage_batch(stage) == batch)


# ── schedules ─────────────────────────────────────────────────────────────────────────────────────────────────────


@given(starts, stages)
def test_a_constant_schedule_never_moves(start: int, stage: int) -> None:
    assert constant(start).stage_batch(stage) == start
    assert constant(start).last_stage == 0


@given(starts, st.integers(1, 100), stages)
def test_linear_growth_adds_its_increment_at_each_stage(start: int, increment: int, stage: int) -> None:
    assert linear(start, increment).stage_batch(stage) == start + increment * stage


@given(starts, factors, stages)
def test_exponential_growth_is_the_smallest_integer_not_below_the_power(
    start: int, factor: Fraction, stage: int
) -> None:
    exact = start * Fraction(float(factor)) ** stage
    nearest = round(exact)
    wanted = nearest if abs(exact / nearest - 1) < Fraction(1, 10**12) else math.ceil(exact)
    assert exponential(start, float(factor)).stage_batch(stage) == wanted


@given(starts, stages, st.sampled_from([(11, 10), (3, 2), (2, 1), (13, 10), (7, 5)]))
def test_float_round_off_adds_no_sample_to_a_rational_power(start: int, stage: int, ratio: tuple[int, int]) -> None:
    top, bottom = ratio
    assert exponential(start, top / bottom).stage_batch(stage) == -(-start * top**stage // bottom**stage)


@given(starts, factors, st.integers(0, 5000))
def test_an_exponential_schedule_grows_to_exactly_its_cap(start: int, factor: Fraction, more: int) -> None:
    cap = start + more
    growth = exponential(start, float(factor), cap)
    assert growth.last_stage == first_reached(growth, cap)
    below = [growth.stage_batch(stage) for stage in range(int(growth.last_stage))]
    assert below == sorted(below)
    assert all(batch <= cap for batch in below)
    assert growth.stage_batch(int(growth.last_stage) + 5) == cap


@given(starts, st.integers(1, 100), st.integers(0, 5000))
def test_a_linear_schedule_grows_to_exactly_its_cap(start: int, increment: int, more: int) -> None:
    growth = linear(start, increment, start + more)
    assert growth.last_stage == first_reached(growth, start + more)
    assert growth.stage_batch(int(growth.last_stage) + 1) == start + more
    assert growth.growth_steps(10**6) == pytest.approx(more / increment)


@given(starts, factors, st.integers(0, 5000))
def test_the_height_at_the_cap_is_what_the_factor_needs_to_reach_it(start: int, factor: Fraction, more: int) -> None:
    growth = exponential(start, float(factor), start + more)
    exact = math.log((start + more) / start, float(factor))
    assert growth.growth_steps(10**6) == pytest.approx(
        min(exact, growth.last_stage), rel=1e-9
    )  # rounding up may be there sooner
    for stage in range(int(growth.last_stage)):
        assert growth.growth_steps(stage) == stage


def test_growth_without_a_cap_outgrows_every_float_without_an_error() -> None:
    assert exponential(1, 2.0).stage_batch(5000) > 10**15


@given(st.lists(starts, min_size=1, max_size=8), stages)
def test_a_list_is_taken_as_it_is_and_stays_at_its_last(sizes: list[int], stage: int) -> None:
    assert batches(sizes).stage_batch(stage) == (sizes + [sizes[-1]] * 20)[stage]
    assert batches(sizes).start == sizes[0]


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: exponential(16, 0.5), "factor"),
        (lambda: exponential(16, 1.0), "greater than 1"),
        (lambda: exponential(16, math.nan), "factor"),
        (lambda: exponential(16, math.inf), "factor"),
        (lambda: exponential(64, 2, 32), "start=64 is above cap=32; lower start or raise cap"),
        (lambda: linear(64, 16, 32), "start=64 is above cap=32"),
        (lambda: linear(64, 0), "increment"),
        (lambda: constant(0), "start"),
        (lambda: batches([]), "batches"),
        (lambda: batches([8, 0]), "batches"),
        (lambda: every(epochs=0), "epochs"),
        (lambda: every(samples=-5), "samples"),
        (lambda: every(epochs=1, samples=100), "exactly one of epochs, samples, steps, tokens; got epochs and samples"),
        (every, "exactly one of epochs, samples, steps, tokens; got none"),
        (budget, "exactly one of epochs, samples, steps, sfo, compute, tokens; got none"),
        (lambda: budget(epochs=1, sfo=1000), "got epochs and sfo"),
        (lambda: budget(samples=0), "samples"),
        (lambda: budget(steps=-1), "steps"),
        (lambda: Stages(every=Every(epochs=1), power=-1), "power"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_schedule_is_refused_with_its_key(build: object, told: str) -> None:
    assert callable(build)
    with pytest.raises(ConfigError, match=r"(?s)") as refused:
        build()
    assert told in str(refused.value)


# ── optimal, seesaw, increase ───────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60)
@given(st.sampled_from([2.0, 3.0, 1.5]), st.integers(1, 6), st.sampled_from([0.5, 0.3, 0.8, 0.0]))
def test_optimal_stages_are_in_the_ratio_of_delta_over_gamma_squared(factor: float, top: int, power: float) -> None:
    cap = exponential(16, factor).stage_batch(top)
    growth, total = optimal(16, factor, cap), 10**9
    trigger = growth.trigger(Stages(), LR(rule=Power(power=power)), Span(samples=total, epoch=1000))
    assert growth.last_stage == top
    edges = [0, *ends(trigger, top + 1)]
    lengths = [end - begin for begin, end in zip(edges, edges[1:], strict=False)]
    assert edges[-1] == pytest.approx(total, abs=1)
    for shorter, longer in zip(lengths, lengths[1:], strict=False):
        assert longer / shorter == pytest.approx((factor / factor**power) ** 2, rel=2 / shorter)


def test_optimal_growth_needs_a_cap_and_a_budget_for_its_stages() -> None:
    with pytest.raises(ConfigError, match=r"set growth\.cap"):
        optimal(16, 2.0, 64).model_copy(update={"cap": None}).trigger(Stages(), LR(), SPAN)
    with pytest.raises(ConfigError, match="the shortest of 11 stages would have"):
        optimal(1, 2.0, 1024).trigger(Stages(), LR(rule=Constant()), Span(samples=1000, epoch=10))
    with pytest.raises(ConfigError, match="shortest"):
        optimal(1, 2.0, 1024).trigger(Stages(), LR(rule=Factor(factor=4.0)), Span(samples=1000, epoch=10))


@pytest.mark.parametrize("growth", [seesaw(16, 2.0), increase(16, 2.0)])
def test_growth_in_place_of_decay_grows_where_the_decay_would_have_fallen_by_its_factor(growth: Growth) -> None:
    decay = StepDecay.model_validate({"every": {"samples": 700}, "factor": 0.5})
    assert ends(growth.trigger(Stages(), LR(decay=decay), SPAN), 8) == [700 * m for m in range(1, 9)]
    with pytest.raises(ConfigError, match=r"set lr\.decay"):
        growth.trigger(Stages(), LR(), SPAN)
    with pytest.raises(ConfigError, match=r"remove lr\.rule"):
        check_settings(growth, Stages(), LR(decay=decay, rule=Constant()), SPAN)


# ── late, τ-nice ────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    st.integers(1, 6),
    st.sampled_from([2.0, 3.0]),
    st.fractions(Fraction(1, 20), Fraction(19, 20)),
    st.integers(9, 10**6),
)
def test_late_growth_holds_its_first_batch_and_cuts_the_rest_into_equal_stages(
    top: int, factor: float, hold: Fraction, total: int
) -> None:
    growth = late(8, int(8 * factor**top), factor, float(hold))
    span = Span(samples=total, epoch=100)
    rest = (1 - Fraction(float(hold))) * total
    if rest < top:
        with pytest.raises(ConfigError, match=f"{top} stages in the last"):
            growth.trigger(Stages(), LR(), span)
        return
    exact = [total - rest + rest * m / top for m in range(top)]
    found = ends(growth.trigger(Stages(), LR(), span), top + 1)
    assert found[top] == math.inf
    for end, wanted in zip(found, exact, strict=False):
        assert -1e-6 <= end - wanted < 1


def test_late_growth_keeps_the_learning_rate_unless_a_rule_says_else() -> None:
    growth = late(8, 64)
    at_cap = Progress(stage=3)
    assert growth.multiplier(LR(), at_cap, 64, SPAN) == 1
    assert growth.multiplier(LR(rule=Power(power=0.5)), at_cap, 64, SPAN) == pytest.approx(8**0.5)


def test_late_growth_from_its_cap_on_is_constant() -> None:
    assert ends(late(8, 8).trigger(Stages(), LR(), SPAN), 2) == [math.inf] * 2


def test_late_growth_needs_a_cap_and_a_budget_in_samples() -> None:
    with pytest.raises(ConfigError, match=r"set growth\.cap"):
        late(8, 64).model_copy(update={"cap": None}).trigger(Stages(), LR(), SPAN)
    with pytest.raises(ConfigError, match=r"growth\.kind=late .* give budget\.epochs"):
        late(8, 64).trigger(Stages(), LR(), Span(samples=0, epoch=100))
    with pytest.raises(ConfigError, match="sets its own stage lengths"):
        check_settings(late(8, 64), every(samples=100), LR(), SPAN)


CONSTANTS = {"smoothness": 1.0, "largest_smoothness": 5.0, "mu": 0.1, "optimum_sq": 2.0}


@given(st.floats(1e-4, 100))
def test_the_tau_nice_batch_costs_no_more_than_any_other(epsilon: float) -> None:
    growth = tau_nice_batch(100, epsilon=epsilon, **CONSTANTS)
    constants = FiniteSum(samples=100, **CONSTANTS)
    least = min(constants.complexity(float(batch), epsilon) for batch in range(1, 101))
    assert constants.complexity(float(growth.stage_batch(0)), epsilon) == pytest.approx(least)
    assert growth.stage_batch(0) == growth.stage_batch(7) == growth.start
    assert growth.last_stage == 0


def test_constants_of_another_data_set_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"growth.samples=100, but the training set has 90; give that number"):
        tau_nice_batch(100, epsilon=0.1, **CONSTANTS).trigger(Stages(), LR(), Span(samples=1000, epoch=90))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"mu": -1.0}, "mu=-1.0 must be above 0"),
        ({"samples": 1}, "samples"),
        ({"largest_smoothness": 0.5}, "largest_smoothness=0.5 must lie between"),
        ({"smoothness": "1"}, "smoothness"),
        ({"start": 8}, "start follows from the constants; remove it"),
    ],
)
def test_constants_of_no_finite_sum_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        TauNice(**{"samples": 100, "epsilon": 0.1, **CONSTANTS, **changes})
    assert told in str(refused.value)
