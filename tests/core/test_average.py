"""The weights of averages: against plain weighted means of all parameters, and however samples are cut into updates."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrow.core.average import AverageSpec, ema, tail
from distgrow.core.lr import Span

SPAN = Span(samples=1000, epoch=100)


def average(spec: AverageSpec, updates: list[tuple[int, float]]) -> float:
    """The average after updates of (samples, parameter), as an engine takes them in."""
    mean, samples = math.nan, 0
    for batch, parameter in updates:
        weight = spec.weight(samples, batch, SPAN)
        assert 0 <= weight <= 1
        mean = parameter if weight == 1 else mean if weight == 0 else mean + weight * (parameter - mean)
        samples += batch
    return mean


UPDATES = st.lists(st.tuples(st.integers(1, 200), st.floats(-1, 1)), min_size=1, max_size=12)


@given(UPDATES, st.integers(5, 500))
def test_ema_is_the_mean_weighted_by_how_many_samples_ago(updates: list[tuple[int, float]], horizon: int) -> None:
    total, seen, weights = sum(batch for batch, _ in updates), 0, list[float]()
    for batch, _ in updates:
        seen += batch
        decay = math.exp(-(total - seen) / horizon)
        weights.append(decay - math.exp(-(total - seen + batch) / horizon))
    expected = math.fsum(w * p for w, (_, p) in zip(weights, updates, strict=True)) / math.fsum(weights)
    assert average(ema(samples=horizon), updates) == pytest.approx(expected, abs=1e-9)


@given(UPDATES, st.integers(5, 500), st.integers(2, 5))
def test_ema_does_not_depend_on_how_samples_are_cut_into_updates(
    updates: list[tuple[int, float]], horizon: int, parts: int
) -> None:
    cut = [(batch, parameter) for batch, parameter in updates for _ in range(parts)]
    whole = [(batch * parts, parameter) for batch, parameter in updates]
    spec = ema(samples=horizon)
    assert average(spec, cut) == pytest.approx(average(spec, whole), abs=1e-9)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=30), st.floats(0.01, 1))
def test_tail_is_the_mean_over_the_samples_of_the_end(batches: list[int], fraction: float) -> None:
    spec, begin, seen = tail(fraction), (1 - fraction) * SPAN.samples, 0
    weights = list[float]()
    for batch in batches:
        seen += batch
        weights.append(max(0.0, min(batch, seen - begin)))
    updates = [(batch, math.sin(k)) for k, batch in enumerate(batches)]
    if seen <= begin:
        assert math.isnan(average(spec, updates))
        return
    expected = math.fsum(w * p for w, (_, p) in zip(weights, updates, strict=True)) / math.fsum(weights)
    assert average(spec, updates) == pytest.approx(expected, abs=1e-9)


def test_a_horizon_is_in_samples_epochs_or_a_fraction_of_the_budget() -> None:
    specs = [ema(samples=70), ema(epochs=0.5), ema(fraction=0.1), ema()]
    assert [spec.horizon.of(SPAN) for spec in specs] == [70, 50, 100, 50]
