"""Updates whose rows are drawn by coins, against their law by enumeration: subsets, sizes, cuts, estimator and ends."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrow import ConfigError, budget, constant, exponential, independent_sampling, partition_independent_sampling
from distgrow.core.plan import Plan, split_drawn
from distgrow.core.progress import Outcome, Progress
from distgrow.core.sampling import SamplingSpec
from distgrow.core.stages import every
from distgrow.growth.auto import Auto
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.controller import Controller
from distgrow.theory.parts import Part
from distgrow.theory.samplings import Independent, PartitionIndependent

DRAWS = 4_000
KINDS = {"independent": independent_sampling(), "partition": partition_independent_sampling([2, 3])}


def coins(rows: range, chance: Fraction) -> Mapping[tuple[int, ...], Fraction]:
    """The probability of every subset if each row is taken by a coin."""
    return {
        subset: chance**size * (1 - chance) ** (len(rows) - size)
        for size in range(len(rows) + 1)
        for subset in combinations(rows, size)
    }


def law(kind: str, sizes: tuple[int, ...], batch: int) -> Mapping[tuple[int, ...], Fraction]:
    """The probability of every set of rows of an update."""
    n, found = sum(sizes), dict[tuple[int, ...], Fraction]()
    if kind == "independent":
        return coins(range(n), Fraction(batch, n))
    first = 0
    for size in sizes:
        for rows, chance in coins(range(first, first + size), Fraction(batch, size)).items():
            found[rows] = found.get(rows, Fraction(0)) + chance * Fraction(size, n)
        first += size
    return found


def updates(sampling: SamplingSpec, n: int, batch: int, count: int = DRAWS) -> Iterator[tuple[int, ...]]:
    """The rows of a run's updates, as its plans and cursor give them."""
    control = Controller(growth=constant(batch), budget=budget(steps=count), epoch=n, sampling=sampling, seed=7)
    progress = Progress()
    while not control.done(progress):
        plan = control.plan(progress)
        offsets = np.arange(plan.batch)
        rows = sampling.rows(n, 7, progress.samples, plan.batch, offsets, plan.draw)
        yield tuple(sorted(rows.tolist()))
        progress = control.after(progress, plan, Outcome())


def held(counts: Counter[Any], expected: Mapping[Any, Fraction]) -> None:
    """Frequencies are within 5 standard errors of the law, and nothing else was drawn."""
    assert set(counts) <= {rows for rows, chance in expected.items() if chance}
    total = counts.total()
    for outcome, chance in expected.items():
        error = math.sqrt(float(chance * (1 - chance)) / total)
        assert abs(counts[outcome] / total - float(chance)) <= 5 * error, outcome


@pytest.mark.parametrize("kind", KINDS)
def test_every_set_of_rows_is_drawn_as_often_as_the_coins_say(kind: str) -> None:
    expected = law(kind, (2, 3), 2)
    assert sum(expected.values()) == 1
    for row in range(5):
        assert sum(chance for rows, chance in expected.items() if row in rows) == Fraction(2, 5)
    held(Counter(updates(KINDS[kind], 5, 2)), expected)


def test_updates_are_independent_also_after_an_empty_one() -> None:
    """Two rows, one on average: 16 pairs of sets, each as often. An empty update leaves the cursor where it was."""
    pairs, sets = Counter(pairwise(updates(independent_sampling(), 2, 1))), list(coins(range(2), Fraction(1, 2)))
    held(pairs, {(one, other): Fraction(1, 16) for one in sets for other in sets})


def test_large_batches_have_the_moments_of_a_binomial_number() -> None:
    n, batch, count = 50_000, 20_000, 2_000
    found = np.array([independent_sampling().size(n, 3, k * batch, k, batch) for k in range(count)])
    deviation = math.sqrt(batch * (1 - batch / n))
    assert abs(found.mean() - batch) < 5 * deviation / math.sqrt(count)
    assert found.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * count))


GRADIENTS = np.array([0.7, -0.6, 5.1, -5.2])  # of four points ½a(x − c)², a = 1 … 4, c = 0, 1, −1, 2, at the optimum .7
PARTS = [
    Part(smoothness=1.5, each=[1.0, 2.0], squares=[0.49, 0.36], mean_sq=0.05**2),
    Part(smoothness=3.5, each=[3.0, 4.0], squares=[5.1**2, 5.2**2], mean_sq=0.05**2),
]
WHOLE = Part(smoothness=2.5, each=[1.0, 2.0, 3.0, 4.0], squares=(GRADIENTS**2).tolist(), mean_sq=0.0)


@pytest.mark.parametrize(
    ("kind", "batch", "noise"),
    [
        ("independent", 1, 10.10625), ("independent", 2, 3.36875), ("independent", 3, 1.122917), ("independent", 4, 0),
        ("partition", 1, 6.74), ("partition", 2, 0.0025),
    ],
)  # fmt: skip
def test_weights_make_the_sum_over_what_is_drawn_unbiased_and_its_noise_is_that_of_the_formula(
    kind: str, batch: int, noise: float
) -> None:
    """By enumeration of every set, with the weights that a plan gives its micro-batches, on one and two ranks."""
    expected = law(kind, (2, 2), batch)
    formula = Independent(WHOLE) if kind == "independent" else PartitionIndependent(PARTS, (0.5, 0.5))
    assert formula.noise_at(batch) == pytest.approx(noise, abs=1e-6)
    for world in (1, 2):
        mean = square = 0.0
        for rows, chance in expected.items():
            micro, accum = split_drawn(len(rows), world, 2)
            plan = Plan(batch=len(rows), world=world, micro=micro, accum=accum, lr=0.1, stage=0, expected=batch, draw=1)
            parts = [part for rank in range(world) for part in plan.rows(0, rank) if len(part)]
            means = [(len(part), GRADIENTS[[rows[place] for place in part]].mean()) for part in parts]
            estimate = sum(plan.weight(size) * value for size, value in means) / world
            mean, square = mean + float(chance) * estimate, square + float(chance) * estimate**2
        assert mean == pytest.approx(GRADIENTS.mean(), abs=1e-12)
        assert square == pytest.approx(formula.noise_at(batch), rel=1e-9, abs=1e-12)


@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 9), st.integers(0, 1000))
def test_ranks_and_micro_batches_have_every_row_once_whatever_is_drawn(
    batch: int, world: int, max_micro: int, start: int
) -> None:
    micro, accum = split_drawn(batch, world, max_micro)
    plan = Plan(batch=batch, world=world, micro=micro, accum=accum, lr=0.1, stage=0, expected=8)
    parts = [plan.rows(start, rank) for rank in range(world)]
    assert [row for rank in parts for part in rank for row in part] == list(range(start, start + batch))
    assert all(len(rank) == accum and max(map(len, rank)) <= micro <= max_micro for rank in parts)
    assert [[len(part) for part in rank] for rank in parts] == [plan.sizes(rank) for rank in range(world)]


def test_the_schedule_goes_by_the_mean_and_the_first_update_to_reach_the_budget_is_the_last() -> None:
    control = Controller(
        growth=exponential(4, 2, 16), stages=every(samples=100), budget=budget(samples=301), epoch=60,
        sampling=independent_sampling(), world=2, seed=1,
    )  # fmt: skip
    progress, plans = Progress(), list[Plan]()
    while not control.done(progress):
        assert progress.ledger.applied < 301
        progress = control.advance(progress)
        plans.append(control.plan(progress))
        assert plans[-1] == control.plan(progress)
        assert plans[-1].scheduled == 4 * 2 ** plans[-1].stage
        assert plans[-1].stage == min(2, progress.ledger.applied // 100)
        progress = control.after(progress, plans[-1], Outcome())
    assert progress.ledger.applied == progress.samples == sum(plan.batch for plan in plans) >= 301
    assert len({plan.batch for plan in plans}) > 5
    assert {plan.lr for plan in plans} == {control.rate(Progress(stage=m), 4 * 2**m) for m in range(3)}
    outlined = list(control.outline(Progress()))
    assert outlined == [(0, 4, 25), (1, 8, 13), (2, 16, 7)]  # to 100, 204 and 316
    assert [stride.plan.scheduled for stride in control.forecast()] == [4, 8, 16]


@pytest.mark.parametrize(
    ("sampling", "growth", "why"),
    [
        (independent_sampling(), Auto(start=4), "growth.kind=auto decides by what it measures.*exponential.*kind=nice"),
        (independent_sampling(), constant(65), "growth.start=65 exceeds the 64 samples"),
        (partition_independent_sampling(4), exponential(4, 2, 32), "batch=32 of stage 3 exceeds .* 16 rows"),
        (partition_independent_sampling([20, 30]), constant(4), r"sampling.parts=\[20, 30\] sums to 50"),
    ],
)
def test_what_cannot_be_drawn_is_refused(sampling: SamplingSpec, growth: GrowthPolicy, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Controller(growth=growth, budget=budget(samples=1000), epoch=64, sampling=sampling).check()
