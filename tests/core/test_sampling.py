"""What updates draw by each sampling, against its law: of every batch, of two updates, and of the gradient's noise."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrow import ConfigError, budget, constant, exponential, nice_sampling, partition_sampling, stratified_sampling
from distgrow.core.endless import ENDLESS
from distgrow.core.noise_stats import Measuring
from distgrow.core.progress import Progress
from distgrow.core.sampling import SamplingSpec
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.controller import Controller
from distgrow.growth.noise_scale import noise_scale
from distgrow.theory.parts import Part
from distgrow.theory.samplings import PartitionNice, Stratified

DRAWS = 3_000


def updates(sampling: SamplingSpec, n: int, batch: int, count: int = DRAWS, seed: int = 7) -> Iterator[tuple[int, ...]]:
    """The rows of updates in a row."""
    offsets = np.arange(batch)
    for k in range(count):
        yield tuple(sampling.rows(n, seed, k * batch, batch, offsets).tolist())


def nice(rows: Sequence[int], batch: int) -> Mapping[tuple[int, ...], Fraction]:
    """Every subset, each as often."""
    return {subset: Fraction(1, math.comb(len(rows), batch)) for subset in combinations(rows, batch)}


def law(kind: str) -> Mapping[tuple[int, ...], Fraction]:
    """The probability of every batch of two out of five rows, in parts of two and three."""
    if kind == "nice":
        return nice(range(5), 2)
    if kind == "partition":
        return {(0, 1): Fraction(2, 5), **{rows: Fraction(3, 5) / 3 for rows in combinations((2, 3, 4), 2)}}
    one_each = {(i, j): Fraction(4, 5) / 6 for i in (0, 1) for j in (2, 3, 4)}  # shares of .8 and 1.2 rows
    return {**one_each, **{rows: Fraction(1, 5) / 3 for rows in combinations((2, 3, 4), 2)}}


KINDS = {"nice": nice_sampling(), "partition": partition_sampling([2, 3]), "stratified": stratified_sampling([2, 3])}


def held(counts: Counter[tuple[int, ...]], expected: Mapping[tuple[int, ...], Fraction]) -> None:
    """Frequencies are within 5 standard errors of the law, and nothing else was drawn."""
    assert set(counts) == set(expected)
    total = counts.total()
    for outcome, chance in expected.items():
        error = math.sqrt(float(chance * (1 - chance)) / total)
        assert abs(counts[outcome] / total - float(chance)) < 5 * error, outcome


@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_is_drawn_as_often_as_its_law_says(kind: str) -> None:
    assert sum(law(kind).values()) == 1
    held(Counter(tuple(sorted(rows)) for rows in updates(KINDS[kind], 5, 2)), law(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_is_drawn_with_probability_batch_over_n(kind: str) -> None:
    for row in range(5):
        assert sum(chance for rows, chance in law(kind).items() if row in rows) == Fraction(2, 5)
    counts = Counter(row for rows in updates(KINDS[kind], 5, 2) for row in rows)
    for row in range(5):
        assert abs(counts[row] / DRAWS - 2 / 5) < 5 * math.sqrt(0.4 * 0.6 / DRAWS)


def test_two_updates_in_a_row_are_independent() -> None:
    pairs = Counter(one + other for one, other in pairwise(updates(nice_sampling(), 3, 1)))
    held(pairs, {(i, j): Fraction(1, 9) for i in range(3) for j in range(3)})


def test_the_order_within_a_batch_is_random_so_that_micro_batches_are_subsets_too() -> None:
    held(Counter(updates(nice_sampling(), 4, 2)), {rows: Fraction(1, 12) for rows in permutations(range(4), 2)})


def test_another_seed_draws_other_batches() -> None:
    one, other = (list(updates(nice_sampling(), 50, 5, 20, seed)) for seed in (1, 2))
    assert not set(one) & set(other)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**40), st.data())
def test_shares_of_parts_are_rounded_up_or_down_and_no_row_comes_twice(
    sizes: list[int], start: int, data: st.DataObject
) -> None:
    n, ends = sum(sizes), np.cumsum(sizes)
    batch = data.draw(st.integers(1, n))
    rows = stratified_sampling(sizes).rows(n, 3, start, batch, np.arange(batch))
    assert len(set(rows.tolist())) == batch
    for end, size in zip(ends, sizes, strict=True):
        count = int(((rows >= end - size) & (rows < end)).sum())
        assert math.floor(Fraction(batch * size, n)) <= count <= math.ceil(Fraction(batch * size, n))


@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_of_an_update_gives_the_same_rows(kind: str) -> None:
    n, batch = 60, 23
    sampling = {**KINDS, "partition": partition_sampling(2), "stratified": stratified_sampling(7)}[kind]
    whole = sampling.rows(n, 5, 460, batch, np.arange(batch))
    for cuts in ([0, 10, 23], [0, 1, 2, 3, 23], list(range(24))):
        parts = [sampling.rows(n, 5, 460, batch, np.arange(a, b)) for a, b in pairwise(cuts)]
        assert np.concatenate(parts).tolist() == whole.tolist()


@pytest.mark.parametrize("kind", ["nice", "partition", "stratified"])
def test_the_noise_of_what_is_drawn_is_that_of_the_formula(kind: str) -> None:
    gradients = np.array([0.7, -0.6, 5.1, -5.2])  # of the four points of Alfarra et al.'s formulas, at the optimum
    parts = [
        Part(smoothness=1.5, each=[1.0, 2.0], squares=[0.49, 0.36], mean_sq=0.05**2),
        Part(smoothness=3.5, each=[3.0, 4.0], squares=[5.1**2, 5.2**2], mean_sq=0.05**2),
    ]
    sampling, noise = {
        "nice": (nice_sampling(), 13.475 * 2 / 6),
        "partition": (partition_sampling(2), PartitionNice(parts, (0.5, 0.5)).noise_at(2)),
        "stratified": (stratified_sampling(2), Stratified(2.5, parts).noise_at(2)),
    }[kind]
    squares = np.array([gradients[list(rows)].mean() ** 2 for rows in updates(sampling, 4, 2)])
    assert squares.mean() == pytest.approx(noise, abs=5 * squares.std() / math.sqrt(DRAWS) + 1e-12)


def test_with_as_many_equal_parts_as_ranks_each_rank_reads_one() -> None:
    sampling = stratified_sampling(3)
    control = Controller(growth=constant(12), budget=budget(samples=120), epoch=60, world=3, sampling=sampling)
    for k in range(10):
        for rank in range(3):
            [positions] = control.plan(Progress()).rows(12 * k, rank)
            rows = sampling.rows(60, 0, 12 * k, 12, np.array(positions) - 12 * k)
            assert {int(row) // 20 for row in rows} == {rank}


def test_batches_in_parts_are_not_measured_and_subsets_are() -> None:
    measured = [
        Controller(growth=constant(8), budget=budget(epochs=1), epoch=64, max_micro=4, sampling=sampling)
        .plan(Progress())
        .window
        for sampling in (None, nice_sampling(), partition_sampling(2), stratified_sampling(2))
    ]
    assert measured[0] == measured[1] > 0
    assert measured[2:] == [0, 0]


REFUSED: list[tuple[SamplingSpec, GrowthPolicy, int, int | None, str]] = [
    (partition_sampling([20, 30]), constant(4), 64, None, r"sampling.parts=\[20, 30\] sums to 50, .* has 64 samples"),
    (stratified_sampling(65), constant(4), 64, None, "sampling.parts=65 exceeds the 64 samples"),
    (nice_sampling(), constant(4), ENDLESS, None, "a stream without a length has not; leave it out"),
    (partition_sampling(4), exponential(4, 2, 32), 64, None, "batch=32 of stage 3 exceeds .* can draw, 16 rows"),
    (
        partition_sampling(2),
        noise_scale(4, 16),
        64,
        None,
        "growth.kind=noise_scale measures noise",
    ),
    (stratified_sampling(2), constant(4), 64, 1, "run.noise.every=1 measures noise"),
]


@pytest.mark.parametrize(("sampling", "growth", "epoch", "every", "why"), REFUSED)
def test_what_cannot_be_drawn_or_measured_is_refused(
    sampling: SamplingSpec, growth: GrowthPolicy, epoch: int, every: int | None, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        Controller(
            growth=growth, budget=budget(samples=1000), epoch=epoch, sampling=sampling,
            measuring=Measuring(every=every),

        ).check()  # fmt: skip
