"""The smoothed statistics against known distributions, and what they forget."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrow.core.noise_stats import Mean, Measured, Measuring, Noise
from distgrow.core.progress import Progress

ENDLESS = 10**9  #: a window that forgets nothing in a test


def measured(gradients: list[np.ndarray]) -> Measured:
    """What an engine would find from the gradients of an update's samples, part by part."""
    batch = sum(len(part) for part in gradients)
    parts_sq = sum(len(part) * (part.mean(0) ** 2).sum() for part in gradients) / batch
    return Measured(parts_sq=parts_sq, batch_sq=float((np.concatenate(gradients).mean(0) ** 2).sum()))


@pytest.mark.parametrize("sizes", [(4, 4), (1, 2), (5, 5, 6), (1, 1, 1, 1, 1)])
def test_gradient_and_noise_are_estimated_without_bias_from_parts_of_any_size(sizes: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    full, root = random.normal(size=3), random.normal(size=(3, 3))
    noise = Noise()
    for _ in range(8000):
        parts = [full + random.normal(size=(size, 3)) @ root for size in sizes]
        noise = noise.after(sum(sizes), len(sizes), ENDLESS, measured(parts))
    assert noise.grad_sq.value == pytest.approx((full**2).sum(), abs=4 * noise.grad_sq.error)
    assert noise.variance.value == pytest.approx((root**2).sum(), abs=4 * noise.variance.error)
    assert noise.variance.error < 0.05 * (root**2).sum()


def test_drawn_without_replacement_the_gradient_at_one_place_is_low_by_the_noise_of_a_whole_epoch() -> None:
    random = np.random.default_rng(1)
    rows = random.normal(size=(12, 3))
    noise = Noise()
    for _ in range(8000):
        drawn = rows[random.permutation(12)[:8]]
        noise = noise.after(8, 2, ENDLESS, measured([drawn[:4], drawn[4:]]))
    low = noise.variance.value / 12
    assert noise.grad_sq.value + low == pytest.approx((rows.mean(0) ** 2).sum(), abs=5 * noise.grad_sq.error)
    assert noise.variance.value == pytest.approx(rows.var(0, ddof=1).sum(), abs=4 * noise.variance.error)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 99)), min_size=2, max_size=30), st.integers(2, 50))
def test_the_mean_is_that_of_exponential_weights(weighed: list[tuple[float, int]], window: int) -> None:
    mean, keep = Mean(), 1 - 1 / window
    for value, weight in weighed:
        mean = mean.add(value, keep, weight)
    values, own = zip(*weighed, strict=True)
    weights = keep ** np.arange(len(values) - 1, -1, -1.0) * own
    assert mean.value == pytest.approx(np.average(values, weights=weights), abs=1e-9)
    assert mean.count == len(values)


def test_the_standard_error_is_the_spread_of_the_mean_over_many_runs() -> None:
    random = np.random.default_rng(2)
    means: list[Mean] = []
    for _ in range(2000):
        mean = Mean()
        for value in random.normal(3, 2, size=60):
            mean = mean.add(value, 0.95)
        means.append(mean)
    spread = np.std([mean.value for mean in means])
    assert math.sqrt(np.mean([mean.error**2 for mean in means])) == pytest.approx(spread, rel=0.05)


def test_the_standard_error_is_not_too_small_where_batches_grow() -> None:
    random, batches = np.random.default_rng(3), np.repeat([8, 16, 32, 64], 15)
    means: list[Mean] = []
    for _ in range(2000):
        mean = Mean()
        for batch, value in zip(batches, random.normal(3, 100 / batches), strict=True):
            mean = mean.add(value, 0.95, batch)
        means.append(mean)
    spread = np.std([mean.value for mean in means])
    assert spread <= math.sqrt(np.mean([mean.error**2 for mean in means])) <= 2.5 * spread


def test_what_large_batches_show_counts_more() -> None:
    small, large = Measured(parts_sq=3.0, batch_sq=2.0), Measured(parts_sq=0.3, batch_sq=0.2)
    noise = Noise().after(8, 2, ENDLESS, small, 2.0).after(72, 2, ENDLESS, large, 1.0)
    for mean, first, second in ((noise.grad_sq, 1.0, 0.1), (noise.variance, 8.0, 7.2), (noise.loss, 2.0, 1.0)):
        assert mean.value == pytest.approx(0.1 * first + 0.9 * second)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_values_have_no_standard_error(count: int) -> None:
    mean = Mean().add(1.0, 0.9) if count else Mean()
    assert mean.error == math.inf
    assert math.isnan(mean.value) == (count == 0)


def test_the_progress_test_counts_value_i_of_k_as_i_parts_of_k() -> None:
    noise, values = Noise(), [-8.0, 1.0, 2.0, 4.0]
    for value in values:
        noise = noise.after(8, 1, 0, Measured(product=value))
    assert noise.product.value == pytest.approx(np.average(values, weights=[1, 2, 3, 4]))


def test_a_new_stage_drops_what_depends_on_it_and_keeps_the_rest() -> None:
    found = Measured(parts_sq=3.0, batch_sq=2.0, product=1.0)
    progress = Progress(noise=Noise().after(8, 2, 100, found, 0.5))
    later = progress.grow(1).noise
    assert (later.grad_sq, later.variance) == (progress.noise.grad_sq, progress.noise.variance)
    assert later.loss == progress.noise.loss
    assert (later.product.count, progress.noise.product.count) == (0, 1)
    assert (later.fresh, progress.noise.fresh) == (0, 1)
    assert (later.trend.count, progress.noise.trend.count) == (0, 1)
    assert progress.grow(0) is progress


def test_the_loss_is_known_of_every_update_and_its_mean_of_the_measured_ones() -> None:
    noise = Noise().after(8, 2, 100, Measured(parts_sq=3.0, batch_sq=2.0), 0.5).after(8, 2, 0, Measured(), 0.25)
    assert (noise.loss.value, noise.fresh, noise.trend.count) == (0.5, 1, 2)
    assert noise.after(8, 2, 0, Measured(), math.nan) == noise


@given(st.floats(0, 3))
def test_the_ends_of_the_interval_are_so_many_standard_errors_away(errors: float) -> None:
    mean = Mean().add(1.0, 1.0).add(4.0, 1.0)
    assert mean.end(errors) - mean.value == pytest.approx(errors * mean.error)
    assert mean.value - mean.end(-errors) == pytest.approx(errors * mean.error)
    assert Mean().add(1.0, 1.0).end(0.0) == 1.0


@pytest.mark.parametrize(
    ("parts", "window", "found"),
    [
        (2, 0, Measured(parts_sq=3.0, batch_sq=2.0)),
        (1, 100, Measured(parts_sq=3.0, batch_sq=2.0)),
        (2, 100, Measured()),
        (2, 100, Measured(parts_sq=math.inf, batch_sq=math.inf)),
    ],
)
def test_what_was_not_measured_changes_nothing(parts: int, window: int, found: Measured) -> None:
    assert Noise().after(8, parts, window, found) == Noise()


def test_it_survives_being_written_down() -> None:
    found = Measured(parts_sq=3.1, batch_sq=2.7, product=0.1)
    progress = Progress(noise=Noise().after(8, 2, 100, found, 0.7), policy={"samples": 7.1})
    probed = progress.probed(1437)
    assert Progress.from_dict(json.loads(json.dumps(probed.to_dict()))) == probed
    assert (probed.ledger.probe, probed.probe_samples) == (1437, 0)


def test_before_anything_is_known_nothing_is_claimed() -> None:
    assert math.isnan(Noise().scale)
    assert Measuring().every is None


@pytest.mark.parametrize(("samples", "memory"), [(1, 100), (14, 100), (20, 71), (100, 20), (10**6, 20)])
def test_without_a_window_about_an_epoch_is_remembered(samples: int, memory: int) -> None:
    assert Measuring().memory(samples, 1437) == memory
    assert Measuring(window=7).memory(samples, 1437) == 7
