"""The default growth anneals where that is worth more than going on, and to the end of the budget; by closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from measurements import shown, walk
from sfo_quadratic import EPOCH, Quadratic, play, standard
from sfo_results import Course

from distgrow import auto, budget
from distgrow.config.load import parse
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, DecayEvery, StepDecay
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.growth.auto import Auto
from distgrow.growth.controller import Controller
from distgrow.theory.noise import removable_loss

TOTAL = 10_000


def controller(growth: Auto, epoch: int = 5000, **settings: object) -> Controller:
    given = {"growth": growth, "lr": LR(base=0.5), "budget": budget(samples=TOTAL), "epoch": epoch, "max_micro": 8}
    return Controller(**{**given, **settings})  # pyright: ignore[reportArgumentType]


def turn(growth: Auto, variance: float, slope: float) -> int:
    """Applied samples when the anneal begins, where the loss falls along a line and tr Σ is known."""

    def outcome(progress: Progress, plan: Plan) -> Outcome:
        middle = progress.ledger.applied + plan.batch / 2
        return shown(plan, 1.0, variance, loss=3.0 - slope * middle)

    return next(progress.ledger.applied for progress, plan in walk(controller(growth), outcome) if plan.stage > 0)


# ── when it begins ──────────────────────────────────────────────────────────────────────────────────────────────


@given(st.floats(0.5, 50.0), st.floats(1e-5, 1e-3), st.sampled_from([0.1, 0.25, 1.0]))
def test_it_begins_where_the_removable_loss_first_outweighs_the_fall_to_come(
    variance: float, slope: float, margin: float
) -> None:
    growth = Auto(start=10, cap=100, margin=margin, early=0.05, hold=0.9, confidence=0.0)
    began, removable = turn(growth, variance, slope), 0.5 * variance / 40
    exact = TOTAL - removable / (margin * slope)  # there margin · slope · (samples left) is what can be removed
    latest = 1 - 0.1 / math.sqrt(2)  # where the line is half-way to a temperature of a half
    assert began == pytest.approx(min(latest * TOTAL, max(0.05 * TOTAL, exact)), abs=20)


def test_it_has_not_settled_before_early_where_all_is_noise() -> None:
    assert turn(Auto(start=10, cap=100, early=0.2, hold=0.6), variance=1e6, slope=1e-9) == 0.2 * TOTAL


@given(
    st.lists(st.tuples(st.floats(0.05, 1.0), st.floats(0.01, 5.0)), min_size=1, max_size=6),
    st.floats(0.05, 1.9),
    st.integers(1, 64),
)
def test_on_a_quadratic_that_has_settled_annealing_removes_what_it_says(
    directions: list[tuple[float, float]], lr: float, batch: int
) -> None:
    h, c = np.array(directions).T
    settled = Quadratic(curvature=h, noise=c, moments=lr * c / (batch * h * (2 - lr * h)))
    assert np.allclose(settled.after(lr, batch).moments, settled.moments)  # so they are a fixed point
    said = removable_loss(lr, settled.variance, batch)
    assert said <= settled.loss * (1 + 1e-9)
    assert settled.loss <= said * 2 / (2 - lr * h.max()) * (1 + 1e-9)


@pytest.mark.parametrize("updates", [200, 1000])
def test_a_loss_that_scatters_is_not_taken_to_have_settled(updates: int) -> None:
    growth = Auto(start=10, cap=10, confidence=1.0)

    def ahead(seed: int) -> bool:
        scatter = np.random.default_rng(seed).normal(0, 0.15, updates)

        def outcome(progress: Progress, plan: Plan) -> Outcome:  # 0.01 of the loss can be removed, it falls by 1
            return shown(plan, 1.0, 0.8, loss=3 - progress.step / updates + scatter[progress.step])

        run = walk(controller(growth, budget=budget(samples=10 * updates)), outcome)
        changes = [(progress.step, b.stage) for (_, a), (progress, b) in pairwise(run) if b.stage > a.stage]
        return any(step / updates < growth.due(stage - 1) - 0.05 for step, stage in changes)

    assert np.mean([ahead(seed) for seed in range(40)]) < 0.1


def test_a_learning_rate_that_has_decayed_to_nothing_leaves_nothing_to_remove() -> None:
    lr = LR(decay=StepDecay(every=DecayEvery(samples=10), factor=0.001))

    def outcome(progress: Progress, plan: Plan) -> Outcome:
        return shown(plan, 1.0, 1.0, loss=3 - progress.ledger.applied / TOTAL)

    run = list(walk(controller(auto(), lr=lr), outcome))
    began = next(progress.ledger.applied for progress, plan in run if plan.stage > 0)
    assert began == pytest.approx((0.3 + 0.7 * (1 - 1 / math.sqrt(2))) * TOTAL, abs=16)


# ── the anneal ──────────────────────────────────────────────────────────────────────────────────────────────────


def colder(run: list[tuple[Progress, Plan]], factor: float, cap: int) -> None:
    """The temperature η/b of every update is the stage's, by the batch as far as the cap goes and by η beyond it."""
    for _, plan in run[:-1]:
        wanted = 0.5 / 8 * factor**-plan.stage
        assert plan.lr / plan.batch == pytest.approx(wanted, rel=1 / plan.batch)  # batches are rounded up
        assert plan.lr <= 0.5 * (1 + 1e-12)
        assert plan.lr == pytest.approx(0.5) or plan.batch == cap


@pytest.mark.slow
@given(st.integers(1, 12), st.sampled_from([2.0, 3.0, 4.0]), st.integers(8, 200))
def test_once_settled_every_stage_is_as_long_as_the_next(depth: int, factor: float, cap: int) -> None:
    growth = Auto(start=8, cap=cap, factor=factor, depth=depth, early=0.5, hold=0.5)
    run = list(walk(controller(growth), lambda progress, plan: shown(plan, 1.0, 1e6, loss=1.0)))
    begins = [0, *(after.ledger.applied for (_, a), (after, b) in pairwise(run) if b.stage > a.stage), TOTAL]
    lengths = [after - before for before, after in pairwise(begins)]
    assert len(lengths) == depth + 1
    assert all(length == pytest.approx(TOTAL / 2 / depth, abs=2 * cap) for length in lengths[1:])
    colder(run, factor, cap)


@pytest.mark.parametrize("settles", [0.55, 0.6, 0.68, 0.74])
def test_a_loss_that_settles_late_leaves_equal_parts_of_the_rest_to_all_stages(settles: float) -> None:
    def outcome(progress: Progress, plan: Plan) -> Outcome:
        variance = 1e6 if progress.ledger.applied >= settles * TOTAL else 1e-6
        return shown(plan, 1.0, variance, loss=3.0 - progress.ledger.applied / TOTAL)

    growth = Auto(start=8, cap=16, hold=0.3, margin=1.0)
    run = list(walk(controller(growth), outcome))
    begins = {b.stage: after.ledger.applied for (_, a), (after, b) in pairwise(run) if b.stage > a.stage}
    assert sorted(begins) == list(range(1, 11))
    each = (TOTAL - begins[2]) / 9
    lengths = [after - before for before, after in pairwise([*(begins[stage] for stage in range(2, 11)), TOTAL])]
    assert all(length == pytest.approx(each, abs=32) for length in lengths)


@pytest.mark.slow
@given(st.sampled_from([1.5, 2.0, 4.0]), st.integers(8, 200), st.floats(0.1, 0.9), st.integers(0, 20))
def test_a_loss_that_has_not_settled_is_annealed_along_a_line_to_the_end_of_the_budget(
    factor: float, cap: int, hold: float, probe: int
) -> None:
    growth = Auto(start=8, cap=cap, factor=factor, depth=100, hold=hold)
    control, progress, run = controller(growth, budget=budget(sfo=TOTAL)), Progress(), list[tuple[Progress, Plan]]()
    while not control.done(progress):
        progress = control.advance(progress)
        run.append((progress, control.plan(progress)))
        progress = progress.after(run[-1][1], Outcome()).probed(probe)  # a budget that probes eat into
    colder(run, factor, cap)
    for at, plan in run:
        left = TOTAL - at.ledger.total
        line, late = min(1.0, left / (1 - hold) / (at.ledger.applied + left)), (probe + cap) / left
        assert math.sqrt(factor) * (1 + late) >= factor**-plan.stage / line >= 1 / math.sqrt(factor) / (1 + late)


def test_without_a_cap_the_largest_batch_is_a_quarter_of_the_data_or_a_stage_at_its_shortest() -> None:
    def largest(growth: Auto, epoch: int, total: int) -> int:
        return controller(growth, epoch=epoch, budget=budget(samples=total)).growth.stage_batch(10)

    assert largest(auto(), 1000, 100_000) == 250
    assert largest(auto(), 1000, 2000) == 140  # (1 − hold) · 2000 samples in 10 stages
    assert largest(auto(start=400), 1000, 100_000) == 400
    assert largest(auto(start=8, cap=90), 1000, 100_000) == 90


@pytest.mark.parametrize("epochs", [4, 8, 16, 32])
def test_at_equal_gradient_evaluations_it_ends_below_every_constant_batch(epochs: int) -> None:
    def norm(growth: dict, lr: float) -> float:
        values = {"growth": growth, "lr": {"base": lr}, "budget": {"epochs": float(epochs)}}
        course = Course()
        play(standard(), parse({"task": {"kind": "digits"}, **values}), EPOCH, course, None)
        assert course.last is not None
        return course.last.grad_norm

    constant = [norm({"kind": "constant", "start": b}, lr) for b in (4, 16, 64, 256) for lr in (0.03, 0.1, 0.3, 1.0)]
    assert norm({"kind": "auto"}, 1.0) < 0.9 * min(constant)


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: Auto(early=0.8, hold=0.5), r"early=0\.8 is after hold=0\.5"),
        (lambda: controller(auto(), budget=budget(steps=100)), r"growth\.kind=auto goes by the samples axis"),
        (
            lambda: controller(auto(start=1), budget=budget(samples=12)),
            r"10 stages in the last 8\.4 samples of the budget",
        ),
        (lambda: controller(auto(start=1), max_micro=2).check(), "does not show; raise growth.start to at least 2"),
    ],
)
def test_what_cannot_be_is_refused(build: object, told: str) -> None:
    with pytest.raises((ConfigError, ValueError, TypeError), match=told):
        build()  # pyright: ignore[reportCallIssue]


def test_its_bounds_are_told_before_a_run() -> None:
    control = controller(Auto(start=10, cap=80, early=0.1, hold=0.5))
    slow, fast = ([*control.outline(Progress(), soonest=soon)] for soon in (False, True))
    assert {stage for stage, _, _ in fast} == set(range(11)) >= {stage for stage, _, _ in slow}
    assert [batch * updates for _, batch, updates in (slow[0], fast[0])] == [6470, 1000]  # 1 − 0.5/√2 of it, and 0.1
    assert isinstance(control.growth, Auto)
    assert math.isinf(control.growth.earliest(control.lr, control.span).end(11))
