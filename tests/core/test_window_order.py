"""WindowOrder: each row once an epoch, shuffled in windows of few pieces, the same whoever asks for what."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrow.core.errors import ConfigError
from distgrow.core.window_order import WindowOrder

SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=12).map(tuple)


@given(sizes=SIZES, window=st.integers(1, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 3))
def test_every_row_comes_once_an_epoch(sizes: tuple[int, ...], window: int, seed: int, epoch: int) -> None:
    order = WindowOrder(sizes=sizes, window=window, seed=seed)
    n = sum(sizes)
    epochs, rows = order(np.arange(epoch * n, (epoch + 1) * n))
    assert set(epochs.tolist()) == {epoch}
    assert sorted(rows.tolist()) == list(range(n))


@given(sizes=SIZES, window=st.integers(1, 40), start=st.integers(0, 200), count=st.integers(0, 50))
def test_a_row_follows_from_its_position_alone(sizes: tuple[int, ...], window: int, start: int, count: int) -> None:
    order = WindowOrder(sizes=sizes, window=window, seed=3)
    together = order(np.arange(start, start + count))[1].tolist()
    assert together == [int(order(position)[1]) for position in range(start, start + count)]


def test_a_window_needs_only_the_pieces_that_its_rows_fill() -> None:
    order = WindowOrder(sizes=(10,) * 100, window=40, seed=1)
    rows = order(np.arange(1000))[1].reshape(25, 40)
    assert {len(np.unique(window // 10)) for window in rows} == {4}


def test_windows_and_epochs_are_shuffled_differently() -> None:
    order = WindowOrder(sizes=(64,), window=32, seed=1)
    first, second = order(np.arange(64))[1] % 32, order(np.arange(64, 128))[1] % 32
    shuffles = [first[:32].tolist(), first[32:].tolist(), second[:32].tolist(), second[32:].tolist()]
    assert len({tuple(shuffle) for shuffle in shuffles}) == 4


def test_places_in_a_window_are_uniform() -> None:
    """Chi-squared over where each of 8 rows of a window comes, in 4,000 windows."""
    places = WindowOrder(sizes=(8,) * 4000, window=8, seed=5)(np.arange(32_000))[1].reshape(4000, 8) % 8
    counts = np.stack([np.bincount(places[:, k], minlength=8) for k in range(8)])
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 49 + 5 * np.sqrt(2 * 49)  # 7 × 7 degrees of freedom


@pytest.mark.parametrize(("sizes", "window"), [((), 4), ((0,), 4), ((3,), 0)])
def test_nothing_to_shuffle_is_refused(sizes: tuple[int, ...], window: int) -> None:
    with pytest.raises(ConfigError):
        _ = WindowOrder(sizes=sizes, window=window)
