"""Every run takes exactly its budget, in the batches that its schedule names, whatever the world is."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow import (
    batches,
    budget,
    constant,
    every,
    exponential,
    factor_lr,
    increase,
    linear,
    optimal,
    power_lr,
    seesaw,
    sqrt_lr,
)
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, WSD, Cosine, Decay, DecayEvery, StepDecay
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.core.stages import Stages
from distgrow.growth import Growth
from distgrow.growth.controller import Controller


def walk(control: Controller, skip: Callable[[int], bool] = lambda _: False) -> Iterator[tuple[Progress, Plan]]:
    """The run, update by update, as the training loop takes it; the updates numbered in `skip` are not applied."""
    progress, number = Progress(), 0
    while not control.done(progress):
        progress = control.advance(progress)
        plan = control.plan(progress)
        yield progress, plan
        progress = progress.after(plan, Outcome(applied=not skip(number)))
        number += 1


@dataclass(frozen=True)
class ByHand:
    """A schedule as one would write it in a notebook: lists of batches and of absolute stage ends."""

    sizes: list[int]
    ends: list[float]

    def updates(self, samples: int) -> list[tuple[int, int]]:
        """(stage, batch) of every update of a run of `samples` samples."""
        done, found = 0, []
        while done < samples:
            stage = next(m for m, end in enumerate(self.ends) if done < end)
            batch = self.sizes[stage]
            left = samples - done
            batch = batch if left - batch >= self.sizes[0] or left == batch else left
            found.append((stage, batch))
            done += batch
        return found


growths = st.one_of(
    st.builds(constant, st.integers(1, 60)),
    st.builds(lambda start, by, more: linear(start, by, start + more), *[st.integers(1, 40)] * 3),
    st.builds(lambda start, by: exponential(start, by, 16 * start), st.integers(1, 20), st.sampled_from([1.3, 2, 3])),
    st.builds(batches, st.lists(st.integers(1, 60), min_size=1, max_size=6).map(sorted)),
)  # fmt: skip


decays: st.SearchStrategy[Decay] = st.one_of(
    st.builds(Cosine, warmup=st.sampled_from([0.0, 0.1]), final=st.sampled_from([0.0, 0.1])),
    st.builds(WSD, warmup=st.sampled_from([0.0, 0.1]), decay=st.sampled_from([0.2, 0.9])),
    st.builds(lambda length: StepDecay(every=DecayEvery(samples=length)), st.integers(1, 500)),
)
replacing = st.sampled_from([seesaw(8, 2.0), increase(8, 3.0, 100), seesaw(3, 1.5, 40)])


@st.composite
def controllers(draw: st.DrawFn) -> Controller:
    """Any growth, stages in samples or epochs, a budget that is a multiple of nothing."""
    epoch, amount = draw(st.integers(1, 400)), draw(st.integers(1, 3000))
    total = budget(samples=amount) if draw(st.booleans()) else budget(sfo=amount)
    match draw(st.sampled_from(["plain", "replacing", "optimal"])):
        case "replacing":
            return Controller(growth=draw(replacing), lr=LR(decay=draw(decays)), budget=total, epoch=epoch)
        case "optimal":
            return Controller(growth=optimal(1, 2.0, 8), budget=budget(samples=amount + 15), epoch=epoch)
        case _:
            length = draw(st.integers(1, 300))
            stages = every(samples=length) if draw(st.booleans()) else every(epochs=-(-length // epoch))
            return Controller(growth=draw(growths), stages=stages, budget=total, epoch=epoch)


@settings(max_examples=150, deadline=None)
@given(controllers())
def test_the_last_sample_of_the_budget_is_the_last_sample_of_the_run(control: Controller) -> None:
    plans = [plan for _, plan in walk(control)]
    assert sum(plan.batch for plan in plans) == control.budget.total(control.epoch) == control.samples()


@settings(max_examples=150, deadline=None)
@given(growths, st.integers(1, 300), st.integers(1, 3000))
def test_stages_begin_with_the_first_update_at_or_after_their_boundary(growth: Growth, length: int, total: int) -> None:
    control = Controller(growth=growth, stages=every(samples=length), budget=budget(samples=total), epoch=100)
    count = int(min(growth.last_stage, total)) + 1
    hand = ByHand([growth.stage_batch(m) for m in range(count)], [*(length * m for m in range(1, count)), math.inf])
    assert [(plan.stage, plan.batch) for _, plan in walk(control)] == hand.updates(total)


@settings(max_examples=100, deadline=None)
@given(growths, st.integers(1, 30), st.integers(1, 200))
def test_stages_in_steps_have_exactly_that_many_updates(growth: Growth, length: int, steps: int) -> None:
    control = Controller(growth=growth, stages=every(steps=length), budget=budget(steps=steps), epoch=100)
    stages = [plan.stage for _, plan in walk(control)]
    assert stages == [min(k // length, int(growth.last_stage)) for k in range(steps)]
    assert all(plan.batch == growth.stage_batch(plan.stage) for _, plan in walk(control))


@settings(deadline=None, max_examples=40)
@given(controllers())
def test_the_learning_rate_of_every_update_is_what_the_policy_makes_of_its_progress(control: Controller) -> None:
    for progress, plan in walk(control):
        factor = control.growth.multiplier(control.lr, progress, plan.scheduled, control.span)
        assert plan.lr == control.lr.initial * factor


@settings(max_examples=150, deadline=None)
@given(controllers())
def test_no_batch_but_the_last_two_leaves_the_schedule(control: Controller) -> None:
    plans = [plan for _, plan in walk(control)]
    assert all(plan.batch == control.growth.stage_batch(plan.stage) for plan in plans[:-1])
    if control.samples() >= control.growth.start:
        assert all(plan.batch >= control.growth.start for plan in plans)
    else:
        assert [plan.batch for plan in plans] == [control.samples()]


@settings(max_examples=150, deadline=None)
@given(controllers())
def test_the_forecast_is_the_run(control: Controller) -> None:
    expanded = [
        (stride.plan.stage, stride.plan.batch, stride.plan.micro, stride.plan.accum)
        for stride in control.forecast()
        for _ in range(stride.updates)
    ]
    assert expanded == [(plan.stage, plan.batch, plan.micro, plan.accum) for _, plan in walk(control)]
    begins = dict(walk(control))
    for stride in control.forecast():
        assert begins[stride.begin] == stride.plan


@settings(max_examples=100, deadline=None)
@given(controllers(), st.data())
def test_a_forecast_from_anywhere_is_the_rest_of_the_run(control: Controller, data: st.DataObject) -> None:
    run = [(progress, plan.stage, plan.batch) for progress, plan in walk(control)]
    at = data.draw(st.integers(0, len(run) - 1))
    strides = control.forecast(run[at][0])
    rest = [(stride.plan.stage, stride.plan.batch) for stride in strides for _ in range(stride.updates)]
    assert rest == [(stage, batch) for _, stage, batch in run[at:]]


@settings(max_examples=60, deadline=None)
@given(controllers(), st.integers(2, 4), st.integers(2, 9))
def test_neither_world_nor_micro_batch_decides_anything(control: Controller, world: int, max_micro: int) -> None:
    other = replace(control, world=world, max_micro=max_micro)
    for at, plan in walk(control):
        if plan.batch < world:
            with pytest.raises(ConfigError, match=f"batch={plan.batch} is smaller than world={world}"):
                other.plan(at)
            continue
        wide = other.plan(at)
        assert (wide.batch, wide.stage, wide.lr, wide.seed) == (plan.batch, plan.stage, plan.lr, plan.seed)
        assert (wide.world, wide.micro <= max_micro) == (world, True)


@settings(max_examples=100, deadline=None)
@given(growths, st.integers(1, 2000), st.sets(st.integers(0, 40)))
def test_skipped_updates_cost_sfo_and_move_neither_step_nor_stage(growth: Growth, total: int, skip: set[int]) -> None:
    control = Controller(growth=growth, stages=every(samples=100), budget=budget(samples=total), epoch=100)
    undisturbed = [(plan.stage, plan.batch, plan.lr) for _, plan in walk(control)]
    run = list(walk(control, skip.__contains__))
    applied = [(plan.stage, plan.batch, plan.lr) for k, (_, plan) in enumerate(run) if k not in skip]
    assert applied == undisturbed
    for (before, plan), (after, _) in zip(run, run[1:], strict=False):
        assert after.samples == before.samples + plan.batch
    assert [progress.step for progress, _ in run] == [
        sum(k not in skip for k in range(number)) for number in range(len(run))
    ]


@settings(max_examples=60, deadline=None)
@given(growths, st.integers(1, 2000), st.sets(st.integers(0, 40)))
def test_a_budget_in_sfo_is_charged_with_skipped_updates(growth: Growth, total: int, skip: set[int]) -> None:
    control = Controller(growth=growth, stages=every(samples=100), budget=budget(sfo=total), epoch=100)
    assert sum(plan.batch for _, plan in walk(control, skip.__contains__)) == total


def test_a_one_sample_budget_is_one_update_of_one_sample() -> None:
    for growth in (constant(1), constant(64), exponential(16, 2), linear(8, 8), batches([4, 8])):
        for total in (budget(samples=1), budget(sfo=1), budget(epochs=0.001)):
            control = Controller(growth=growth, budget=total, epoch=100)
            assert [plan.batch for _, plan in walk(control)] == [1]
    with pytest.raises(ConfigError, match="the budget ends with a batch of 1, fewer than the 2 ranks"):
        replace(control, world=2).check()


def test_overshooting_a_stage_never_adds_up() -> None:
    control = Controller(growth=exponential(7, 2, 7 * 2**6), stages=every(samples=1000), budget=budget(samples=7000),
                         epoch=10_000)  # fmt: skip
    begins = {plan.stage: progress.samples for progress, plan in reversed(list(walk(control)))}
    assert [0 <= begins[stage] - 1000 * stage < control.growth.stage_batch(stage - 1) for stage in range(1, 7)] == [
        True
    ] * 6


def test_a_plan_of_a_million_stages_on_a_hundred_thousand_ranks_is_arithmetic() -> None:
    control = Controller(
        growth=exponential(10**5, 2, 10**6), stages=every(samples=10**9), budget=budget(samples=10**15), epoch=10**9,
        world=10**5, max_micro=4,
    )  # fmt: skip
    strides = list(control.forecast())
    assert len(strides) < 10
    assert sum(stride.plan.batch * stride.updates for stride in strides) == 10**15


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"world": 33}, "batch=16 is smaller than world=33"),
        ({"world": 33}, "raise growth.start to at least 33 or use at most 16 workers"),
        ({"epoch": 40, "growth": exponential(16, 2)}, "batch=64 of stage 2 exceeds the 40 samples"),
        ({"epoch": 40, "growth": exponential(16, 2)}, "set growth.cap (or growth.start) to at most 40"),
        ({"epoch": 10, "budget": budget(samples=10)}, "growth.start=16 exceeds the 10 samples of the training set"),
        ({"world": 3, "max_micro": 1}, "raise engine.max_micro to 2"),
        ({"max_micro": 0}, "max_micro=0 (an int): allowed is"),
    ],
)
def test_what_a_run_would_run_into_is_told_before_it_starts(changes: dict[str, Any], told: str) -> None:
    control = Controller(
        growth=exponential(16, 2, 32), stages=every(samples=200), lr=sqrt_lr(0.1), budget=budget(samples=900), epoch=100
    )
    control.check()
    with pytest.raises(ConfigError) as refused:
        replace(control, **changes).check()
    assert told in str(refused.value)


@pytest.mark.parametrize("growth", [seesaw(8), increase(8), optimal(8, 2.0, 64)])
def test_stages_on_the_samples_axis_refuse_a_budget_in_steps(growth: Growth) -> None:
    lr = LR() if growth.kind == "optimal" else LR(decay=Cosine())
    with pytest.raises(ConfigError, match=f"growth.kind={growth.kind} .* give budget.epochs"):
        Controller(growth=growth, lr=lr, budget=budget(steps=200), epoch=100)


def test_a_finished_run_can_still_be_asked_for_its_stage() -> None:
    control = Controller(growth=seesaw(8), lr=LR(decay=Cosine()), budget=budget(samples=500), epoch=100)
    *_, (last, plan) = walk(control)
    end = last.after(plan, Outcome())
    assert control.done(end)
    assert control.advance(end).stage >= last.stage


def test_a_falling_list_ends_in_batches_of_its_own() -> None:
    control = Controller(growth=batches([64, 4]), stages=every(samples=128), budget=budget(samples=203), epoch=100)
    assert [plan.batch for _, plan in walk(control)] == [64, 64] + [4] * 17 + [7]


@pytest.mark.parametrize(
    ("lr", "growth"),
    [
        (power_lr(1e305, 2.0), linear(1, 1)),
        (factor_lr(0.1, 4.0), linear(1, 1)),
        (factor_lr(0.1, 1e300), linear(1, 1)),
    ],
)
def test_a_learning_rate_beyond_all_numbers_is_told_before_the_run(lr: LR, growth: Growth) -> None:
    control = Controller(growth=growth, stages=every(steps=1), lr=lr, budget=budget(steps=3000), epoch=10**18)
    with pytest.raises(ConfigError, match="grows beyond all numbers by stage"):
        control.check()


def test_what_no_run_could_reach_is_refused() -> None:
    for total in (budget(samples=10**400), budget(epochs=1e306), budget(sfo=2**63)):
        with pytest.raises(ConfigError, match="more than a run can have"):
            Controller(growth=constant(8), budget=total, epoch=1000)
    for lengths in (every(epochs=1e306), every(epochs=[1.0, 1e306]), every(samples=10**30)):
        with pytest.raises(ConfigError, match="longer than any run"):
            Controller(growth=constant(8), stages=lengths, budget=budget(samples=100), epoch=1000)


def test_an_empty_training_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 0 samples; it needs at least 1"):
        Controller(growth=constant(1), stages=Stages(), budget=budget(samples=1), epoch=0)


@pytest.mark.parametrize("growth", [linear(16, 16), exponential(16, 2.0), exponential(16, 1.0001)])
def test_a_run_of_more_stages_than_anyone_can_wait_for_is_refused(growth: Growth) -> None:
    control = Controller(growth=growth, stages=every(steps=1), budget=budget(steps=2**62), epoch=10**9)
    with pytest.raises(ConfigError, match="1,048,576 stages"):
        sum(1 for _ in control.outline(Progress()))
