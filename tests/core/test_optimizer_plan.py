"""An optimizer's settings at growth: half-lives in samples, Adam's sums of weights one by one, decay a sample."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrow.core.budget import Budget
from distgrow.core.lr import LR, Constant, Linear, Rule, Sqrt
from distgrow.core.optimizer_plan import AtGrowth, OptimizerPlan
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.core.stages import every
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.constant import Constant as ConstantBatch
from distgrow.growth.controller import Controller
from distgrow.growth.exponential import exponential
from distgrow.growth.steps import steps

ALL = AtGrowth(beta2="samples", momentum="samples", weight_decay="samples", moments="reset")


def updates(growth: GrowthPolicy, spec: AtGrowth, *, rule: Rule | None = None, samples: int = 600) -> list[Plan]:
    """All updates of a run whose third is skipped."""
    controller = Controller(
        growth=growth, stages=every(samples=100), lr=LR(base=0.1, rule=rule), budget=Budget(samples=samples), epoch=900,
        at_growth=spec,
    )  # fmt: skip
    progress, plans = Progress(), list[Plan]()
    while not controller.done(progress):
        progress = Progress.from_dict(controller.advance(progress).to_dict())
        plan = controller.plan(progress)
        applied = len(plans) != 2
        plans.append(plan)
        progress = controller.after(progress, plan, Outcome(applied=applied))
    del plans[2]
    return plans


def of(plan: Plan) -> OptimizerPlan:
    assert plan.optimizer is not None
    return plan.optimizer


@given(st.lists(st.integers(10, 60), min_size=1, max_size=6), st.floats(0.5, 0.999), st.floats(0, 0.95))
def test_a_decay_by_samples_forgets_over_samples_alone(batches: list[int], beta2: float, beta1: float) -> None:
    plans = updates(steps(batches), AtGrowth(beta2="samples", momentum="samples"))
    total, first = sum(plan.batch for plan in plans), plans[0].batch
    assert math.prod(of(plan).beta2(beta2) for plan in plans) == pytest.approx(beta2 ** (total / first), rel=1e-9)
    assert math.prod(of(plan).momentum(beta1) for plan in plans) == pytest.approx(beta1 ** (total / first), rel=1e-9)
    assert all(of(plan).weight_decay(0.1) == 0.1 and not of(plan).reset for plan in plans)


@pytest.mark.parametrize(
    "spec", [ALL, AtGrowth(beta2="samples"), AtGrowth(momentum="samples"), AtGrowth(moments="reset")]
)
@given(st.lists(st.integers(10, 60), min_size=1, max_size=6), st.floats(0.5, 0.999), st.floats(0, 0.95))
def test_adams_means_are_divided_by_the_weights_that_are_there(
    spec: AtGrowth, batches: list[int], beta2: float, beta1: float
) -> None:
    mass1 = mass2 = 0.0
    for t, plan in enumerate(updates(steps(batches), spec), start=1):
        how = of(plan)
        now1, now2 = how.momentum(beta1), how.beta2(beta2)
        mass1 = now1 * (0.0 if how.reset else mass1) + 1 - now1
        mass2 = now2 * mass2 + 1 - now2
        assert how.moment_factor(beta1) == pytest.approx((1 - now1**t) / mass1, rel=1e-6)
        assert how.root_factor(beta2) == pytest.approx(math.sqrt(mass2 / (1 - now2**t)), rel=1e-6)


@pytest.mark.parametrize("rule", [Constant(), Sqrt(), Linear()])
def test_decay_a_sample_is_that_of_the_first_batch(rule: Rule) -> None:
    for plan in updates(exponential(10, 2, 80), ALL, rule=rule):
        assert plan.lr * of(plan).weight_decay(0.5) / plan.batch == pytest.approx(0.1 * 0.5 / 10)


def test_first_moments_begin_anew_where_the_batch_changes_and_only_there() -> None:
    plans = updates(steps([10, 10, 20, 20, 20, 50]), AtGrowth(moments="reset"))
    changed = [k for k in range(1, len(plans)) if plans[k].stage != plans[k - 1].stage]
    grown = [k for k in range(1, len(plans)) if plans[k].batch != plans[k - 1].batch]
    assert len(changed) == 5
    assert [k for k, plan in enumerate(plans) if of(plan).reset] == grown
    assert len(grown) == 2


def test_at_a_constant_batch_nothing_is_changed_to_the_last_bit() -> None:
    for plan in updates(ConstantBatch(start=12), ALL):
        how = of(plan)
        assert (how.beta2(0.999), how.momentum(0.9), how.weight_decay(0.1)) == (0.999, 0.9, 0.1)
        assert (how.moment_factor(0.9), how.root_factor(0.999), how.reset) == (1.0, 1.0, False)


def test_without_anything_asked_a_plan_says_nothing() -> None:
    assert all(plan.optimizer is None for plan in updates(exponential(10, 2, 80), AtGrowth()))
