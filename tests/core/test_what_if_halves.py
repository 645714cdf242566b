"""The held-back half and the rank correlation of the benchmark of what-if."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from what_if_halves import halves, ranks, spearman

values = st.lists(st.integers(0, 6), min_size=2, max_size=12)


@given(st.lists(st.text(), unique=True), st.randoms())
def test_halves_are_a_partition_that_does_not_depend_on_the_order(names: list[str], random: object) -> None:
    one, other = halves(names)
    assert sorted(one + other) == sorted(names)
    assert len(other) - len(one) in (0, 1)
    shuffled = list(names)
    random.shuffle(shuffled)  # pyright: ignore
    assert halves([*shuffled, *names]) == (one, other)


@given(values, st.data())
def test_the_rank_correlation_is_scipys(one: list[int], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.integers(0, 6), min_size=len(one), max_size=len(one)))
    if len(set(one)) == 1 or len(set(other)) == 1:
        assert spearman(one, other) == 0
    else:
        assert spearman(one, other) == pytest.approx(spearmanr(one, other)[0], abs=1e-9)


@given(values)
def test_ranks_are_means_of_any_order_of_equal_values(found: list[int]) -> None:
    first = np.argsort(np.argsort(found, kind="stable"), kind="stable")
    expected = [np.mean([first[k] for k in range(len(found)) if found[k] == value]) for value in found]
    assert ranks(found) == pytest.approx(expected)
