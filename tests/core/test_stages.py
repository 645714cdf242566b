"""Triggers and budgets are the closed forms that they name, to the sample."""

import math
from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from triggers import ends

from distgrow import batches, budget, every, exponential, linear
from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Span
from distgrow.core.progress import Progress
from distgrow.core.spec import at_least
from distgrow.core.stages import Geometric, Listed, stage_at

SPAN = Span(samples=10_000, epoch=100)


@given(st.integers(1, 1000), st.sampled_from(["samples", "steps"]))
def test_equal_stages_end_at_the_multiples_of_their_length(length: int, unit: str) -> None:
    trigger = every(**{unit: length}).trigger(1.0, epoch=77)
    assert trigger.axis == unit
    assert ends(trigger, 20) == [length * m for m in range(1, 21)]


@given(st.integers(1, 40), st.integers(1, 1000))
def test_an_epoch_is_one_pass_over_the_training_set(tenths: int, epoch: int) -> None:
    length = Fraction(tenths, 10) * epoch
    if length < 1:
        with pytest.raises(ConfigError, match="shorter than one sample"):
            every(epochs=tenths / 10).trigger(1.0, epoch)
        return
    trigger = every(epochs=tenths / 10).trigger(1.0, epoch)
    assert ends(trigger, 12) == [math.ceil(length * m) for m in range(1, 13)]


@given(st.integers(1, 1000), st.sampled_from([(3, 2), (2, 1), (1, 2), (9, 4), (4, 1)]))
def test_geometric_stages_are_the_sums_of_their_lengths(first: int, ratio: tuple[int, int]) -> None:
    exact = Fraction(*ratio)
    wanted = [math.ceil(total) for total in accumulate(first * exact**m for m in range(12))]
    assert ends(Geometric(axis="samples", first=first, ratio=float(exact)), 12) == wanted


@given(st.integers(1, 100), st.sampled_from([1.0, 2.0, 0.5]), st.sampled_from([2.0, 3.0]))
def test_the_power_lengthens_stages_with_the_growth_factor(length: int, power: float, factor: float) -> None:
    trigger = exponential(16, factor).trigger(every(samples=length, power=power), LR(), SPAN)
    lengths = [length * factor ** (power * m) for m in range(6)]
    assert ends(trigger, 6) == [math.ceil(total - 1e-9) for total in accumulate(lengths)]


def test_stages_too_long_for_a_float_never_end() -> None:
    assert Geometric(axis="samples", first=10, ratio=1e10).end(1000) == math.inf


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_a_list_of_lengths_ends_its_stages_at_the_running_sums(lengths: list[int]) -> None:
    trigger = every(samples=lengths).trigger(1.0, 100)
    assert ends(trigger, len(lengths) + 1) == [*accumulate(lengths), math.inf]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 80), st.integers(0, 6))
def test_a_position_belongs_to_the_last_stage_begun_before_it(lengths: list[int], position: int, top: int) -> None:
    begins = [0, *accumulate(lengths)]
    wanted = max(stage for stage, begin in enumerate(begins) if begin <= position and stage <= top)
    assert stage_at(Listed(axis="samples", ends=tuple(begins[1:])), 0, position, top) == wanted


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=60), st.integers(100, 10**9))
def test_listed_stages_end_at_the_sums_of_their_lengths_which_are_rounded_once(each: list[float], epoch: int) -> None:
    trigger = every(epochs=each).trigger(1.0, epoch)
    assert isinstance(trigger, Listed)
    sums = [math.fsum(length * epoch for length in each[: count + 1]) for count in range(len(each))]
    assert trigger.ends == tuple(at_least(value) for value in sums)


def test_a_list_of_lengths_must_fit_the_list_of_batches() -> None:
    for good in ([10, 20], [10, 20, 30]):
        batches([1, 2, 3]).trigger(every(samples=good), LR(), SPAN)
    with pytest.raises(ConfigError, match="has 3 stages, stages.every gives 4"):
        batches([1, 2, 3]).trigger(every(samples=[10, 20, 30, 40]), LR(), SPAN)


def test_a_power_without_a_growth_factor_is_refused() -> None:
    with pytest.raises(ConfigError, match="power=1.0 needs a growth factor"):
        linear(16, 16).trigger(every(samples=10, power=1.0), LR(), SPAN)
    with pytest.raises(ConfigError, match="give one of them"):
        exponential(16).trigger(every(samples=[10, 20], power=1.0), LR(), SPAN)


@given(st.integers(1, 50), st.integers(1, 5000))
def test_a_budget_in_epochs_is_that_many_passes_rounded_up(tenths: int, epoch: int) -> None:
    assert Budget(epochs=tenths / 10).total(epoch) == math.ceil(Fraction(tenths, 10) * epoch)


def test_a_budget_in_steps_is_spent_by_its_last_step() -> None:
    assert budget(steps=3).left(Progress(step=2), 10) == math.inf
    assert budget(steps=3).left(Progress(step=3), 10) == 0
