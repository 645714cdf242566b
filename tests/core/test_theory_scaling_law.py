"""The functional scaling law is the sum that it names, whatever the parts a schedule is cut into."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow.theory.scaling_law import Law, course, memory, settled_noise

parts = st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(1, 200)), min_size=1, max_size=12)
laws = st.builds(
    Law,
    floor=st.floats(0, 2),
    scale=st.floats(0.1, 5),
    power=st.floats(0.1, 2),
    noise=st.floats(0, 3),
    decay=st.floats(1.05, 1.95),
    unit=st.floats(1.0, 30.0),
)


def by_hand(law: Law, schedule: list[tuple[int, float, int]]) -> float:
    """The law's loss, update by update."""
    updates = [(lr, batch) for count, lr, batch in schedule for _ in range(count)]
    time, held = 0.0, list[tuple[float, float]]()
    for lr, batch in updates:
        time += lr
        held.append((time, lr**2 / batch))
    noise = sum(((time - then) / law.unit + 1) ** -law.decay * weight for then, weight in held)
    return law.floor + law.scale * time**-law.power + law.noise * noise


@given(laws, parts, st.floats(0.5, 20.0))
def test_noise_that_falls_is_weighed_by_the_loss_of_its_time(
    law: Law, schedule: list[tuple[int, float, int]], since: float
) -> None:
    single = [(lr, batch) for _, lr, batch in schedule]
    times = np.cumsum([lr for lr, _ in single])
    quiet = law.floor + law.scale * np.maximum(times, since) ** -law.power
    kept = ((times[-1] - times) / law.unit + 1) ** -law.decay * [lr**2 / batch for lr, batch in single]
    expected = law.floor + law.scale * times[-1] ** -law.power + law.noise * np.sum(quiet * kept)
    falling = replace(law, falling=since)
    assert falling.loss(course([(1, lr, batch) for lr, batch in single]))[0] == pytest.approx(expected)


@given(laws, parts, st.floats(0.1, 1000.0))
def test_normalised_steps_are_those_of_a_rate_that_depends_on_the_batch(
    law: Law, schedule: list[tuple[int, float, int]], balance: float
) -> None:
    shortened = [(count, lr * math.sqrt(batch / (batch + balance)), batch) for count, lr, batch in schedule]
    assert replace(law, balance=balance).loss(course(schedule))[0] == pytest.approx(law.loss(course(shortened))[0])


@settings(deadline=None)
@given(laws, parts)
def test_the_loss_is_the_sum_over_all_updates(law: Law, schedule: list[tuple[int, float, int]]) -> None:
    assert law.loss(course(schedule))[0] == pytest.approx(by_hand(law, schedule), rel=0.01)


@given(laws, parts)
def test_parts_of_one_update_are_summed_exactly(law: Law, schedule: list[tuple[int, float, int]]) -> None:
    single = [(1, lr, batch) for _, lr, batch in schedule]
    assert law.loss(course(single))[0] == pytest.approx(by_hand(law, single))


@given(laws, parts)
def test_the_loss_after_a_part_knows_nothing_of_later_ones(law: Law, schedule: list[tuple[int, float, int]]) -> None:
    losses = law.loss(course(schedule), range(len(schedule)))
    for end, loss in enumerate(losses, start=1):
        assert loss == pytest.approx(law.loss(course(schedule[:end]))[0])


def test_noise_settles_at_constant_eta_and_batch() -> None:
    kept = memory(course([(4_000_000, 0.01, 8)]), [0], 1.5, 1.0)[0]
    assert 0.3 * kept == pytest.approx(settled_noise(0.01, 8, 0.3, 1.5, 1.0), rel=0.02)


@given(st.floats(1.1, 1.9), st.floats(1.0, 50.0))
def test_noise_is_forgotten_as_training_goes_on_without_more(decay: float, unit: float) -> None:
    quiet = [memory(course([(50, 1.0, 1), (count, 1.0, 10**12)]), [1], decay, unit)[0] for count in (1, 10, 100, 1000)]
    assert all(after < before for before, after in pairwise(quiet))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: course([]), "above 0"),
        (lambda: course([(3, 0.0, 8)]), "above 0"),
        (lambda: course([(0, 0.1, 8)]), "updates"),
        (lambda: course([(1, 0.1, -8)]), "batches"),
        (lambda: memory(course([(1, 0.1, 8)]), [0], 1.0), "never forgotten"),
        (lambda: memory(course([(1, 0.1, 8)]), [0], 1.5, 0.0), "unit"),
        (lambda: settled_noise(0.1, 0, 1.0, 1.5, 1.0), "batch"),
    ],
)
def test_what_is_no_schedule_is_refused(make: object, told: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=told):
        make()


@given(parts)
def test_a_course_counts_its_samples_and_its_time(schedule: list[tuple[int, float, int]]) -> None:
    found = course([*schedule, (5, 0.0, 10)])  # a rate of 0 moves nothing
    assert found.times[-1] == pytest.approx(math.fsum(n * lr for n, lr, _ in schedule))
    assert found.samples[-1] == pytest.approx(sum(n * batch for n, _, batch in schedule))
    assert np.all(np.diff(found.times) > 0)
