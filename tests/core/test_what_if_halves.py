"""The held-back half and the rank correlation of the benchmark of what-if."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from what_if import named
from what_if_halves import halves, spearman

from distgrow.core.errors import ConfigError


@given(st.lists(st.text(), unique=True), st.randoms())
def test_halves_are_a_partition_that_does_not_depend_on_the_order(names: list[str], random: object) -> None:
    one, other = halves(names)
    assert sorted(one + other) == sorted(names)
    assert len(other) - len(one) in (0, 1)
    shuffled = list(names)
    random.shuffle(shuffled)  # pyright: ignore
    assert halves([*shuffled, *names]) == (one, other)


@pytest.mark.parametrize("other", [[1, 2, 3], [3, 1, 2], [2, 2, 2]])
def test_the_rank_correlation_is_one_of_ranks_and_0_of_equal_values(other: list[int]) -> None:
    """Of n different ranks it is 1 − 6·Σd²/(n(n² − 1))."""
    expected = 0.0 if len(set(other)) == 1 else 1 - 6 * sum((k + 1 - rank) ** 2 for k, rank in enumerate(other)) / 24
    assert spearman([10, 200, 3000], other) == pytest.approx(expected)


def test_a_run_of_the_fronts_is_named_by_task_schedule_and_first_batch() -> None:
    folder = Path("runs/front/digits/late/b32-lr6.10352e-05-s0-124a7b")
    for root in (folder.parents[2], folder.parents[1], folder):
        assert named(root, folder) == ("digits", "late b32")


def test_any_other_run_is_named_by_its_place_in_the_folder() -> None:
    assert named(Path("runs"), Path("runs/mlp/late/1")) == ("mlp", "late")
    assert named(Path("runs"), Path("runs/mlp/late")) == ("mlp", "late")
    with pytest.raises(ConfigError, match="is a run itself"):
        named(Path("runs"), Path("runs"))
