"""A global batch of B is exactly B samples, in order, in equal parts, whatever the world and the micro-batch are."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan, split


def planned(batch: int, world: int, max_micro: int) -> Plan:
    micro, accum = split(batch, world, max_micro)
    return Plan(batch=batch, world=world, micro=micro, accum=accum, lr=0.1, stage=0)


def smallest_accum(batch: int, world: int, max_micro: int) -> int:
    """The fewest micro-batches of at most `max_micro` rows that hold the largest share, by trying."""
    largest = max(len(range(rank, batch, world)) for rank in range(world))
    return next(accum for accum in itertools.count(1) if accum * max_micro >= largest)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """(batch, world, max_micro) with a row for every rank."""
    world = draw(st.integers(1, 9))
    batch = draw(st.integers(world, 4 * world) | st.integers(world, 700))
    return batch, world, draw(st.integers(2, 5) | st.integers(2, 800))


def assert_exact(plan: Plan, start: int, max_micro: int) -> None:
    ranks = [plan.rows(start, rank) for rank in range(plan.world)]
    assert [row for rows in ranks for part in rows for row in part] == list(range(start, start + plan.batch))
    shares = [sum(map(len, rows)) for rows in ranks]
    assert max(shares) - min(shares) <= 1
    for rows in ranks:
        sizes = [len(part) for part in rows]
        assert len(sizes) == plan.accum
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
        assert max(sizes) <= min(plan.micro, max_micro)
    assert max(len(part) for rows in ranks for part in rows) == plan.micro


@settings(max_examples=300, deadline=None)
@given(shapes(), st.integers(0, 10**12))
def test_every_row_is_drawn_once_in_order_and_in_equal_parts(shape: tuple[int, int, int], start: int) -> None:
    assert_exact(planned(*shape), start, shape[2])


def test_every_small_shape_is_exact() -> None:
    for world, max_micro in itertools.product(range(1, 6), range(2, 8)):
        for batch in range(world, 41):
            assert_exact(planned(batch, world, max_micro), 7, max_micro)


@settings(max_examples=300, deadline=None)
@given(shapes())
def test_the_micro_batch_is_raised_before_accumulation(shape: tuple[int, int, int]) -> None:
    batch, world, max_micro = shape
    plan = planned(*shape)
    assert plan.accum == smallest_accum(batch, world, max_micro)
    if math.ceil(batch / world) <= max_micro:
        assert (plan.micro, plan.accum) == (math.ceil(batch / world), 1)


@settings(max_examples=300, deadline=None)
@given(shapes())
def test_weights_make_the_mean_over_ranks_the_mean_over_samples(shape: tuple[int, int, int]) -> None:
    plan = planned(*shape)
    parts = [part for rank in range(plan.world) for part in plan.rows(0, rank)]
    for part in parts:
        assert plan.weight(len(part)) == pytest.approx(float(Fraction(len(part) * plan.world, plan.batch)), rel=1e-15)
    assert math.fsum(plan.weight(len(part)) / plan.world for part in parts) == pytest.approx(1, rel=1e-12)
    losses = [row * row for row in range(plan.batch)]
    by_rank = [
        math.fsum(plan.weight(len(part)) * sum(losses[row] for row in part) / len(part) for part in plan.rows(0, rank))
        for rank in range(plan.world)
    ]
    assert math.fsum(by_rank) / plan.world == pytest.approx(sum(losses) / plan.batch, rel=1e-12)


def test_the_split_of_one_batch_is_what_a_hand_would_write() -> None:
    plan = planned(11, 3, 2)
    assert (plan.micro, plan.accum) == (2, 2)
    assert [[list(part) for part in plan.rows(100, rank)] for rank in range(3)] == [
        [[100], [101, 102]],
        [[103, 104], [105, 106]],
        [[107, 108], [109, 110]],
    ]


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_batch_smaller_than_the_world_is_refused_with_both_numbers_and_the_remedy(batch: int, more: int) -> None:
    world = batch + more
    with pytest.raises(ConfigError) as refused:
        split(batch, world, 64)
    for words in (f"batch={batch} ", f"world={world}", f"growth.start to at least {world}", f"at most {batch} workers"):
        assert words in str(refused.value)


@settings(max_examples=200)
@given(st.integers(1, 12), st.integers(0, 200))
def test_single_row_micro_batches_work_exactly_where_the_world_divides_the_batch(world: int, more: int) -> None:
    batch = world + more
    if batch % world == 0:
        assert_exact(planned(batch, world, 1), 0, 1)
        return
    with pytest.raises(ConfigError) as refused:
        split(batch, world, 1)
    for words in ("max_micro=1", f"batch={batch}", f"world={world}", "raise engine.max_micro to 2", f"of {world}"):
        assert words in str(refused.value)


@pytest.mark.parametrize(("world", "max_micro"), [(0, 4), (-1, 4), (2, 0), (2, -3)])
def test_no_ranks_or_no_rows_are_refused_with_their_values(world: int, max_micro: int) -> None:
    with pytest.raises(ConfigError, match=f"world={world} and max_micro={max_micro} must both be at least 1"):
        split(8, world, max_micro)


@pytest.mark.parametrize("batch", [0, -1])
def test_an_empty_batch_is_refused(batch: int) -> None:
    with pytest.raises(ConfigError, match=f"batch={batch} "):
        split(batch, 1, 4)
