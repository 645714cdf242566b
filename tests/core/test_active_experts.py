"""The schedule of active experts: equal shares of the samples, decided from what is applied and nothing else."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrow import every
from distgrow.core.active_experts import ActiveExperts
from distgrow.core.budget import Budget, budget
from distgrow.core.errors import ConfigError
from distgrow.core.lr import Span
from distgrow.core.progress import Ledger, Outcome, Progress
from distgrow.distributed.world import World
from distgrow.growth.controller import Controller
from distgrow.growth.exponential import Exponential
from distgrow.integrations.session_checks import on_world

EPOCH = 100


def at(applied: int) -> Progress:
    return Progress(samples=applied, ledger=Ledger(applied=applied))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40))
def test_each_number_from_start_to_end_has_an_equal_share_in_order(start: int, end: int, share: int) -> None:
    total = share * (abs(end - start) + 1)
    spec, axis = ActiveExperts(start=start, end=end), Span(samples=total, epoch=EPOCH)
    numbers = [spec.at(at(applied), axis) for applied in range(total)]
    assert numbers == sorted(numbers, reverse=end < start)
    assert Counter(numbers) == dict.fromkeys(range(min(start, end), max(start, end) + 1), share)
    assert (numbers[0], numbers[-1], spec.at(at(total), axis)) == (start, end, end)
    assert spec.most == max(numbers)


def run(limit: Budget, *, world: int = 1, max_micro: int = 64) -> list[tuple[int, int | None]]:
    """Return (applied samples, active experts) of every update."""
    decides = Controller(
        growth=Exponential(start=8, factor=2, cap=32), active=ActiveExperts(start=1, end=4), budget=limit,
        stages=every(samples=96), epoch=EPOCH, world=world, max_micro=max_micro,
    )  # fmt: skip
    made, progress = list[tuple[int, int | None]](), Progress()
    while not decides.done(progress):
        progress = decides.advance(progress)
        plan = decides.plan(progress)
        made.append((progress.ledger.applied, plan.active))
        progress = decides.after(progress, plan, Outcome())
    return made


@pytest.mark.parametrize("limit", [budget(samples=400), budget(epochs=4), budget(sfo=400)])
def test_a_growing_batch_changes_nothing_on_the_axis_of_samples(limit: Budget) -> None:
    made = run(limit)
    assert made == [(applied, 1 + applied // 100) for applied, _ in made]
    assert run(limit, world=4, max_micro=3) == made


def test_a_budget_in_updates_goes_by_the_samples_that_they_will_have() -> None:
    made = run(budget(steps=30))
    total = sum([8] * 12 + [16] * 6 + [32] * 12)
    assert len(made) == 30
    assert made == [(applied, 1 + 4 * applied // total) for applied, _ in made]


def test_without_a_schedule_plans_are_those_of_before() -> None:
    decides = Controller(growth=Exponential(start=8, factor=2, cap=32), budget=budget(samples=400), epoch=EPOCH)
    assert decides.plan(Progress()).active is None
    assert decides.trial(4).active is None


def test_other_trainers_which_give_no_model_its_number_refuse_a_schedule_of_it() -> None:
    decides = Controller(
        growth=Exponential(start=8), active=ActiveExperts(start=1, end=4), budget=budget(samples=400), epoch=EPOCH
    )
    with pytest.raises(ConfigError, match="active experts are given to a model by distgrow's engines alone"):
        on_world(decides, World())


def test_memory_is_tried_with_the_most_experts() -> None:
    decides = Controller(
        growth=Exponential(start=8), active=ActiveExperts(start=4, end=1), budget=budget(samples=400), epoch=EPOCH
    )
    assert decides.trial(4).active == 4
