"""The order is a shuffle of every epoch by arithmetic: exact, independent of batching, and close enough to uniform."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow.core.errors import ConfigError
from distgrow.core.order import Order, mix_int, seeds

SIZES = [*range(1, 20), 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 1000, 1437, 4095, 4096, 4097, 5000]


def deviation(counts: np.ndarray) -> float:
    """Chi-square of `counts` against equal ones, in standard deviations above its mean."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    return (((counts - expected) ** 2).sum() / expected - freedom) / np.sqrt(2 * freedom)


def epochs_of(n: int, count: int, seed: int = 0) -> np.ndarray:
    """The shuffled indices of the first `count` epochs, one a row."""
    return Order(n=n, seed=seed)(np.arange(n * count))[1].reshape(count, n)


@pytest.mark.parametrize("n", SIZES)
def test_every_sample_once_per_epoch_whatever_n(n: int) -> None:
    epochs, indices = Order(n=n, seed=n)(np.arange(4 * n))
    assert (epochs == np.repeat(np.arange(4), n)).all()
    assert (np.sort(indices.reshape(4, n), axis=1) == np.arange(n)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_every_sample_once_per_epoch_whatever_seed_and_epoch(n: int, seed: int, epoch: int) -> None:
    epochs, indices = Order(n=n, seed=seed)(epoch * n + np.arange(n))
    assert set(epochs.tolist()) == {epoch}
    assert sorted(indices.tolist()) == list(range(n))


@pytest.mark.parametrize("n", [20, 64, 1000])
def test_epochs_and_seeds_have_orders_of_their_own(n: int) -> None:
    orders = [tuple(row) for seed in range(20) for row in epochs_of(n, 20, seed).tolist()]
    assert len(set(orders)) == len(orders)
    assert tuple(range(n)) not in orders


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.data())
def test_a_position_has_one_index_however_positions_are_batched(n: int, data: st.DataObject) -> None:
    order, length = Order(n=n, seed=3), 3 * n + 7
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=6)))
    whole_epochs, whole = order(np.arange(length))
    parts = [order(np.arange(first, last)) for first, last in pairwise([0, *cuts, length])]
    assert (np.concatenate([indices for _, indices in parts]) == whole).all()
    assert (np.concatenate([epochs for epochs, _ in parts]) == whole_epochs).all()
    position = data.draw(st.integers(0, length - 1))
    epoch, index = order(position)
    assert (int(epoch), int(index)) == (position // n, whole[position])
    shuffled = np.random.default_rng(0).permutation(length)
    assert (order(shuffled)[1] == whole[shuffled]).all()


def test_any_shape_of_positions_keeps_its_shape() -> None:
    epochs, indices = Order(n=10)(np.arange(24).reshape(2, 3, 4))
    assert epochs.shape == indices.shape == (2, 3, 4)
    assert (indices.reshape(-1) == Order(n=10)(np.arange(24))[1]).all()
    assert Order(n=10)(np.arange(0))[1].size == 0


@pytest.mark.parametrize("n", [2, 3, 5, 8, 10, 16, 50])
def test_the_first_and_the_last_place_are_uniform_over_epochs(n: int) -> None:
    drawn = epochs_of(n, 40_000)
    for place in (0, n - 1):
        assert deviation(np.bincount(drawn[:, place], minlength=n)) < 5


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n", [3, 5, 8, 16])
def test_neighbouring_places_hold_every_ordered_pair_equally_often(n: int, seed: int) -> None:
    drawn = epochs_of(n, 40_000, seed)
    pairs = np.bincount(drawn[:, 0] * n + drawn[:, 1], minlength=n * n).reshape(n, n)
    assert pairs.diagonal().sum() == 0
    assert deviation(pairs[~np.eye(n, dtype=bool)]) < 5


@pytest.mark.parametrize("seed", [0, 1])
def test_all_orders_of_four_are_equally_frequent(seed: int) -> None:
    _, counts = np.unique(epochs_of(4, 48_000, seed) @ 4 ** np.arange(4), return_counts=True)
    assert counts.size == 24
    assert deviation(counts) < 5


@pytest.mark.parametrize("n", [7, 64, 1000])
def test_the_next_epoch_forgets_the_last(n: int) -> None:
    count = 400_000 // n
    drawn = epochs_of(n, count).astype(float)
    centred = drawn - (n - 1) / 2
    correlation = (centred[1:] * centred[:-1]).mean() / (centred**2).mean()
    assert abs(correlation) < 5 / np.sqrt(count * (n - 1))


def test_a_billion_samples_work() -> None:
    n = 10**9
    positions = np.concatenate([np.arange(1000), n - 500 + np.arange(1000), 7 * n + np.arange(1000)])
    epochs, indices = Order(n=n, seed=1)(positions)
    assert (epochs == positions // n).all()
    assert indices.min() >= 0
    assert indices.max() < n
    for epoch in (0, 7):
        assert np.unique(indices[epochs == epoch]).size == (epochs == epoch).sum()
    assert deviation(np.bincount(indices * 10 // n, minlength=10)) < 5


@pytest.mark.parametrize("n", [2**62, 2**62 - 1, 2**61 + 1])
def test_the_largest_orders_stay_in_range(n: int) -> None:
    _, indices = Order(n=n, seed=1)(np.arange(1000))
    assert np.unique(indices).size == 1000
    assert indices.min() >= 0
    assert indices.max() < n


@pytest.mark.parametrize("n", [1000, 10**9 + 7])
def test_memory_is_of_the_positions_asked_for_whatever_n(n: int) -> None:
    order, positions = Order(n=n), np.arange(10**6)
    tracemalloc.start()
    order(positions)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6


@pytest.mark.parametrize("n", [0, -5, 2**62 + 1])
def test_an_order_of_nothing_is_refused_with_the_value(n: int) -> None:
    with pytest.raises(ConfigError, match=f"n={n} samples"):
        Order(n=n)


def test_every_position_has_a_seed_of_its_own() -> None:
    first, other = seeds(0, np.arange(10**6)), seeds(1, np.arange(10**6))
    assert first.dtype == np.uint64
    assert np.unique(np.concatenate([first, other])).size == 2 * 10**6
    for bit in range(64):
        share = ((first >> np.uint64(bit)) & np.uint64(1)).mean()
        assert abs(share - 0.5) < 5 * 0.5 / 1000, bit


@settings(max_examples=60, deadline=None)
@given(st.integers(-(2**70), 2**70), st.integers(0, 2**62), st.integers(0, 40))
def test_seeds_do_not_depend_on_batching(seed: int, start: int, first: int) -> None:
    whole = seeds(seed, start + np.arange(40))
    parts = [seeds(seed, start + np.arange(first)), seeds(seed, start + np.arange(first, 40))]
    assert (np.concatenate(parts) == whole).all()


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**62))
def test_mixed_integers_are_seeds_that_torch_takes(seed: int, number: int) -> None:
    assert 0 <= mix_int(seed, number) < 2**63
    assert mix_int(seed, number) == mix_int(seed, number)


def test_mixed_integers_are_distinct_over_seeds_and_numbers() -> None:
    drawn = {mix_int(seed, number) for seed in range(100) for number in range(1000)}
    assert len(drawn) == 100_000
