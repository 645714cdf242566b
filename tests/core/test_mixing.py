"""MixedOrder: every set has its share of any positions in a row, and its rows come in its own order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrow.core.errors import ConfigError
from distgrow.core.mixing import MixedOrder, Weight, Weights, floor_sum
from distgrow.core.order import Order


def mixed(weights: list[Weight], sizes: tuple[int, ...], seed: int = 3) -> MixedOrder:
    orders = tuple(Order(n=n, seed=k) for k, n in enumerate(sizes))
    return MixedOrder(orders=orders, sizes=sizes, weights=Weights.of(weights), seed=seed)


@given(n=st.integers(0, 60), m=st.integers(1, 50), a=st.integers(0, 200), b=st.integers(0, 200))
def test_the_sum_of_floors_is_the_sum_of_floors(n: int, m: int, a: int, b: int) -> None:
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


WEIGHTS = st.lists(
    st.one_of(
        st.floats(0.001, 10),
        st.dictionaries(st.integers(1, 90), st.floats(0, 10), max_size=3).map(lambda table: {0: 0.5, **table}),
    ),
    min_size=1, max_size=4,
).filter(lambda weights: any(isinstance(weight, float) for weight in weights))  # fmt: skip


@given(weights=WEIGHTS, seed=st.integers(0, 2**63))
def test_counters_are_those_of_counting(weights: list[Weight], seed: int) -> None:
    order = mixed(weights, (7,) * len(weights), seed)
    sets, counts = order.draws(np.arange(150))
    seen = [0] * len(weights)
    for number, count in zip(sets.tolist(), counts.tolist(), strict=True):
        assert count == seen[number]
        seen[number] += 1
    some = np.array([149, 3, 80, 4, 80])
    assert order.draws(some)[0].tolist() == sets[some].tolist()
    assert order.draws(some)[1].tolist() == counts[some].tolist()


def test_any_samples_in_a_row_have_each_set_by_its_weight() -> None:
    """The golden-ratio sequence's discrepancy: a run of n has n·w up to some log n."""
    weights: list[Weight] = [0.6, 0.3, 0.0995, 0.0005]
    sets, _ = mixed(weights, (10**6,) * 4).draws(np.arange(10**12, 10**12 + 200_000))
    for number, weight in enumerate([0.6, 0.3, 0.0995, 0.0005]):
        taken = np.concatenate([[0], np.cumsum(sets == number)])
        for n in (10, 100, 1000, 50_000):
            assert np.abs(taken[n:] - taken[:-n] - n * weight).max() < 2 + np.log2(n)


def test_weights_change_at_the_sample_that_they_name() -> None:
    order = mixed([{0: 1.0, 1000: 0.0}, {0: 0.0, 1000: 1.0, 2000: 3.0}, {0: 0, 2000: 1}], (100, 100, 100))
    sets, _ = order.draws(np.arange(6000))
    assert set(sets[:1000].tolist()) == {0}
    assert set(sets[1000:2000].tolist()) == {1}
    assert abs((sets[2000:] == 2).sum() - 1000) <= 12
    assert set(sets[2000:].tolist()) == {1, 2}


def test_every_row_of_a_set_comes_once_before_any_comes_again() -> None:
    order = mixed([2.0, 1.0], (50, 31))
    _, rows = order(np.arange(4000))
    for first, size in ((0, 50), (50, 31)):
        own = rows[(rows >= first) & (rows < first + size)]
        for begin in range(0, len(own) - size, size):
            assert sorted(own[begin : begin + size].tolist()) == list(range(first, first + size))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0, 0.0], "weights of all 2 sets are 0 from sample 0 on"),
        ([{0: 1.0, 10: 0.0}, 0.0], "are 0 from sample 10 on"),
        ([-1.0], "weight -1.0 of set 0"),
        ([float("nan")], "weight nan of set 0"),
        (["1"], "weight '1' of set 0"),
        ([{5: 1.0}], "set 0 has no weight from sample 0 on"),
        ([{0: 1.0, -3: 1.0}], "from -3 on"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights: list[Weight], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Weights.of(weights)
