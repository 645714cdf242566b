"""Another budget is said to change nothing but the end of a run exactly where every update up to there is the same."""

from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from distgrow import (
    LR,
    WSD,
    Budget,
    Cosine,
    Outcome,
    Progress,
    Schedule,
    StepDecay,
    auto,
    budget,
    constant,
    constant_lr,
    ema,
    every,
    exponential,
    late,
    linear,
    matched,
    noise_scale,
    optimal,
    seesaw,
    tail,
)
from distgrow.core.active_experts import ActiveExperts
from distgrow.core.progress import Ledger
from distgrow.growth.controller import Controller
from distgrow.growth.replan import cut_short, overspent, replanned

EPOCH = 100

#: Schedules, and whether they are cut to the budget.
SCHEDULES: dict[str, tuple[dict[str, Any], bool]] = {
    "constant": ({"growth": constant(4)}, False),
    "by epochs": ({"growth": exponential(4, 2, cap=16), "stages": every(epochs=1)}, False),
    "by steps": ({"growth": exponential(4, 2, cap=16), "stages": every(steps=30)}, False),
    "listed": ({"growth": exponential(4, 2, cap=16), "stages": every(samples=[40, 130])}, False),
    "linear": ({"growth": linear(4, 4, cap=16), "stages": every(epochs=1)}, False),
    "step decay": ({"growth": constant(4), "lr": constant_lr(0.1, StepDecay(factor=0.5))}, False),
    "average in samples": ({"growth": constant(4), "average": ema(samples=50)}, False),
    "measured": ({"growth": noise_scale(4, cap=16)}, False),
    "cosine": ({"growth": constant(4), "lr": constant_lr(0.1, Cosine())}, True),
    "short decay": ({"growth": constant(4), "lr": constant_lr(0.1, WSD(decay=0.02))}, True),
    "warm-up": ({"growth": constant(4), "lr": constant_lr(0.1, WSD(warmup=0.1, decay=0))}, True),
    "late": ({"growth": late(4, 16)}, True),
    "optimal": ({"growth": optimal(4, cap=16)}, True),
    "matched": ({"growth": matched(4, 16), "lr": LR(decay=WSD())}, True),
    "auto": ({"growth": auto(4, depth=3)}, True),
    "seesaw": ({"growth": seesaw(4, cap=16), "lr": LR(decay=Cosine())}, True),
    "average of the budget": ({"growth": constant(4), "average": ema()}, True),
    "active experts": ({"growth": constant(4), "active": ActiveExperts(start=1, end=4)}, True),
    "tail": ({"growth": constant(4), "average": tail()}, True),
}


def controller(name: str, limit: Budget) -> Controller:
    return Schedule(budget=limit, **SCHEDULES[name][0]).controller(EPOCH)


def updates(decides: Controller) -> list[tuple[Any, ...]]:
    """Every update of a run in which nothing is measured: where it begins, and what was decided of it."""
    made, progress = [], Progress()
    while not decides.done(progress):
        progress = decides.advance(progress)
        plan = decides.plan(progress)
        made.append((progress.ledger.applied, plan.stage, plan.batch, plan.lr, plan.seed, plan.average, plan.active))
        progress = decides.after(progress, plan, Outcome())
    return made


def at(samples: int) -> Progress:
    return Progress(step=1, samples=samples, ledger=Ledger(applied=samples))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(200, 900), st.integers(200, 900), st.integers(0, 900))
@example("active experts", 554, 555, 2)
def test_no_change_is_found_only_where_every_update_up_to_the_first_end_is_the_same(
    name: str, first: int, second: int, done: int
) -> None:
    assume(done <= min(first, second))
    old, new = controller(name, budget(samples=first)), controller(name, budget(samples=second))
    if replanned(old, new, at(done)):
        assert SCHEDULES[name][1]
        return
    before, after = updates(old), updates(new)
    whole = [update for update in before if update[0] + 2 * 16 <= min(first, second)]
    assert whole == after[: len(whole)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_cut_to_the_budget_is_found_and_nothing_else(name: str) -> None:
    old, new = controller(name, budget(samples=400)), controller(name, budget(samples=800))
    for done in (0, 120, 400):
        assert bool(replanned(old, new, at(done))) == SCHEDULES[name][1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_budget_in_another_unit_of_the_same_length_changes_nothing(name: str) -> None:
    assert replanned(controller(name, budget(epochs=4)), controller(name, budget(samples=400)), at(120)) == []


def test_the_differences_are_named_with_both_values() -> None:
    old, new = controller("late", budget(samples=400)), controller("late", budget(samples=800))
    assert replanned(old, new, at(120))[0] == "stage 1 begins at sample 600, was at sample 300"
    old, new = controller("cosine", budget(samples=400)), controller("cosine", budget(samples=800))
    assert replanned(old, new, at(200))[0] == (
        "the learning rate at sample 200, where the run stands, is 0.08536, was 0.05"
    )


@pytest.mark.parametrize(
    ("limit", "over"),
    [
        (budget(samples=119), True),
        (budget(samples=120), False),
        (budget(epochs=1), True),
        (budget(steps=29), True),
        (budget(steps=30), False),
        (budget(sfo=120), True),
        (budget(sfo=125), False),
        (Budget(tokens=999, samples=500), True),
        (Budget(tokens=1000, samples=500), False),
    ],
)
def test_a_budget_is_overspent_once_more_is_done_in_its_unit(limit: Budget, *, over: bool) -> None:
    done = Progress(step=30, samples=125, tokens=1000, ledger=Ledger(applied=120, skipped=5))
    assert overspent(limit, done, EPOCH) == over


@given(st.integers(8, 200))
def test_a_last_update_of_another_batch_is_told_from_a_whole_one(samples: int) -> None:
    decides, progress = controller("constant", budget(samples=samples)), Progress()
    while not decides.done(progress):
        assert not cut_short(decides, progress)
        progress = decides.after(progress, decides.plan(progress), Outcome())
    assert cut_short(decides, progress) == (samples % 4 != 0)
