"""Growth by branches, without training: when tests come, what they cost, and what a verdict follows from."""

import math
import random
import statistics
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrow.config.load import parse
from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Span, linear_lr, sqrt_lr
from distgrow.core.progress import Ledger, Progress
from distgrow.growth.branch_decisions import begun, branches_bound, branches_due
from distgrow.growth.branching import Branched, Branching, charge, no_worse, spent_by_others, window_difference
from distgrow.growth.certified import Certified
from distgrow.growth.controller import Controller
from distgrow.growth.learned import Learned

EPOCH = 10_000


def control(growth: Branching, samples: int = 20_000, lr: LR | None = None, **budget: int) -> Controller:
    return Controller(
        growth=growth, lr=lr or LR(base=0.1), budget=Budget(**(budget or {"samples": samples})), epoch=EPOCH
    )


def planned(controller: Controller) -> Branching:
    assert isinstance(controller.growth, Branching)
    return controller.growth


def walk(controller: Controller, choose: "random.Random | None") -> tuple[Progress, list[tuple[int, int]]]:
    """Make a run without an engine; a test is won by any branch that `choose` draws, or by the largest."""
    progress, grown, growth = Progress(), list[tuple[int, int]](), planned(controller)
    while not controller.done(progress):
        if not branches_due(controller, progress):
            plan = controller.plan(progress)
            progress = progress.repeat(plan.batch, 1)
            continue
        ends = list[Progress]()
        for candidate in growth.candidates(progress):
            end = begun(controller, progress, candidate)
            batch = controller.plan(end).batch
            updates, rest = divmod(growth.branch_samples(progress.stage), batch)
            assert rest == 0, "branches end at the same sample"
            assert growth.window_samples(progress.stage) % batch == 0
            ends.append(end.repeat(batch, updates))
        winner = choose.randrange(len(ends)) if choose else len(ends) - 1
        spent = spent_by_others(progress, ends, winner)
        start, progress = progress, charge(ends[winner], spent)
        progress = progress.with_policy(growth.after_test(start, progress))
        if progress.stage > start.stage:
            grown.append((progress.stage, start.ledger.applied))
    return progress, grown


@given(
    st.sampled_from([Certified(), Certified(rates="both"), Learned(), Learned(stages_at_once=2)]),
    st.integers(4_000, 60_000), st.sampled_from([4, 5, 16]), st.sampled_from([2, 3]), st.integers(0, 10**6),
    st.sampled_from([0.05, 0.1, 0.25]),
)  # fmt: skip
def test_whoever_wins_tests_cost_at_most_their_share_and_stages_begin_no_sooner_than_planned(
    growth: Branching, samples: int, windows: int, factor: int, seed: int, cost: float
) -> None:
    settings = {"start": 4, "windows": windows, "factor": factor, "cost": cost}
    growth = type(growth).model_validate({**growth.model_dump(), **settings})
    try:
        controller = control(growth, samples)
    except ConfigError as error:
        assert "a test takes at least" in str(error)
        return
    for choose in (random.Random(seed), None):
        end, grown = walk(controller, choose)
        bound = branches_bound(controller, samples)
        assert bound is not None
        assert end.ledger.applied == samples
        assert end.ledger.probe <= bound <= cost * samples
        soonest = planned(controller).earliest(controller.lr, controller.span)
        assert all(applied >= soonest.end(stage - 1) for stage, applied in grown), (soonest, grown)


def test_a_budget_in_evaluations_pays_for_branches_and_is_met_exactly() -> None:
    end, grown = walk(control(Certified(start=8), sfo=20_000), None)
    assert end.ledger.probe > 0
    assert end.ledger.total == 20_000
    assert len(grown) >= 2


def test_a_difference_by_windows_is_that_of_a_paired_test_by_hand() -> None:
    first = Branched(batch=8, losses=(9.0, 1.0, 2.0, 3.0, 4.0))
    other = Branched(batch=16, losses=(0.0, 1.1, 2.0, 2.9, 4.2))
    differences = [0.1, 0.0, -0.1, 0.2]
    mean, error = window_difference(first, other, 1)
    assert mean == pytest.approx(statistics.mean(differences))
    assert error == pytest.approx(statistics.stdev(differences) / 2)
    assert no_worse(mean, error, tolerance=mean + 2 * error, confidence=2)
    assert not no_worse(mean, error, tolerance=mean + 1.99 * error, confidence=2)
    assert not no_worse(math.nan, 0.0, tolerance=1e9, confidence=0)


@pytest.mark.parametrize(
    ("worse", "winner"),
    [((0.0, 0.0), 2), ((0.0, 0.02), 1), ((0.02, 0.0), 2), ((0.02, 0.02), 0), ((-0.5, 0.005), 2), ((0.0, math.nan), 1)],
)
def test_the_scaled_rate_goes_on_if_no_worse_then_the_kept_one_then_the_run_as_it_was(
    worse: tuple[float, float], winner: int
) -> None:
    growth = Certified(rates="both", tolerance=0.01)
    results = [Branched(batch=8, losses=tuple(float(k) + d for k in range(16))) for d in (0.0, *worse)]
    assert growth.verdict(results).winner == winner


def test_a_branch_that_was_not_finite_is_never_the_larger_batch() -> None:
    growth = Certified(tolerance=1e9)
    lost = Branched(batch=8, losses=(1.0,) * 10 + (math.nan,) * 6)
    whole = Branched(batch=8, losses=(1.0,) * 16)
    assert growth.verdict([whole, lost]).winner == 0
    assert growth.verdict([lost, whole]).winner == 0
    assert growth.verdict([whole, whole]).winner == 1


@pytest.mark.parametrize(
    ("losses", "tolerance", "winner"),
    [
        ((1.0, 1.0, 1.0), 0.0, 2),
        ((1.0, 0.9, 0.95), 0.0, 1),
        ((1.0, 0.9, 0.95), 0.05, 2),
        ((1.0, 1.1, 1.2), 0.0, 0),
        ((math.nan, 1.1, math.inf), 0.0, 1),
        ((math.nan, math.nan, math.nan), 0.0, 0),
    ],
)
def test_the_least_validation_loss_goes_on_and_of_equal_ones_the_larger_batch(
    losses: tuple[float, ...], tolerance: float, winner: int
) -> None:
    growth = Learned(stages_at_once=2, tolerance=tolerance)
    results = [Branched(batch=8 << k, losses=(1.0,) * 16, validation=loss) for k, loss in enumerate(losses)]
    assert growth.verdict(results).winner == winner
    opposite = [replace(result, validation=-result.validation) for result in results]
    greatest = Learned(stages_at_once=2, tolerance=tolerance, metric="accuracy", mode="max")
    assert greatest.verdict(opposite).winner == winner


def test_a_metric_that_may_rise_or_fall_has_to_say_which_is_better() -> None:
    with pytest.raises(ConfigError, match="metric=accuracy may be best if least or greatest: set mode to min or max"):
        Learned(metric="accuracy")


@pytest.mark.parametrize("at", [0, 7, 15])
@pytest.mark.parametrize("lost", [1, 2])
def test_a_branch_that_was_not_finite_is_not_learned_however_well_it_validates(at: int, lost: int) -> None:
    results = [Branched(batch=8 << k, losses=(1.0,) * 16, validation=1.0 - k / 10) for k in range(3)]
    holed = tuple(math.nan if window == at else 1.0 for window in range(16))
    results[lost] = replace(results[lost], losses=holed)
    assert Learned(stages_at_once=2).verdict(results).winner == (2 if lost == 1 else 1)


@pytest.mark.parametrize("lr", [sqrt_lr(0.1), linear_lr(0.1)])
def test_the_rate_follows_the_batch_only_where_a_scaled_branch_has_won(lr: LR) -> None:
    controller = control(Certified(start=8, rates="both"), lr=lr)
    start = Progress().repeat(8, 400)
    _, kept, scaled = (begun(controller, start, c) for c in planned(controller).candidates(start))
    assert lr.rule is not None
    assert controller.plan(kept).lr == 0.1
    assert controller.plan(scaled).lr == 0.1 * lr.rule.factor_for(2)
    twice = begun(controller, scaled, planned(controller).candidates(scaled)[2])
    assert controller.plan(twice).lr == pytest.approx(0.1 * lr.rule.factor_for(4))
    assert controller.plan(begun(controller, kept, planned(controller).candidates(kept)[1])).lr == 0.1


def test_what_others_evaluated_is_charged_once_and_what_memory_refused_is_discarded() -> None:
    start = Progress(ledger=Ledger(applied=100, probe=7, discarded=3))
    ends = [
        replace(start, ledger=Ledger(applied=164, probe=7, discarded=3)),
        replace(start, ledger=Ledger(applied=148, skipped=16, probe=7, discarded=35)),
    ]
    charged = charge(ends[0], spent_by_others(start, ends, 0))
    assert charged.ledger == Ledger(applied=164, probe=7 + 64, discarded=3 + 32)
    charged = charge(ends[1], spent_by_others(start, ends, 1))
    assert charged.ledger == Ledger(applied=148, skipped=16, probe=7 + 64, discarded=35)


BASE: dict[str, Any] = {
    "task": {"kind": "digits"}, "model": {"kind": "mlp"}, "growth": {"kind": "certified", "start": 8, "cap": 64},
    "budget": {"epochs": 20}, "lr": {"base": 0.1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"budget": {"steps": 500}}, "budget.steps has no end"),
        ({"budget": {"samples": 2000}}, "more than growth.cost=0.1 of the budget of 2000 samples"),
        ({"growth": {"kind": "certified", "start": 8, "cap": 100}}, "give cap=64 or 128"),
        ({"lr": {"rule": {"kind": "constant"}}}, "set growth.rates=kept"),
        ({"engine": {"kind": "torch", "ahead": 1}}, "set engine.ahead=0"),
        ({"engine": {"kind": "async"}}, "engine.kind=async"),
        ({"sparsity": {"target": 0.5}}, "leave out sparsity"),
        ({"sampling": {"kind": "nice"}}, "leave out sampling"),
        ({"launch": {"kind": "ray", "workers": [1, 2]}}, "give launch.workers one number"),
        ({"stages": {"every": {"epochs": 1}}}, "sets its own stage lengths"),
        ({"growth": {"kind": "learned", "factor": 1.5}}, "growth.factor"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=".") as refused:
        parse({**BASE, **change}).controller()
    assert told in str(refused.value).replace(",", "") or told in str(refused.value)


def test_a_bound_of_the_rate_holds_for_every_way_that_tests_may_go() -> None:
    growth = control(Certified(start=8, cap=64)).growth
    lr, span = LR(base=0.1), Span(samples=20_000, epoch=EPOCH)
    for stage in range(4):
        state = Progress(stage=stage, policy={"followed": stage})
        planned_rate = growth.multiplier(lr, Progress(stage=stage), 8 << stage, span)
        assert growth.highest_rate(lr, stage, planned_rate) >= growth.multiplier(lr, state, 8 << stage, span)
