"""Whatever adaptive growth is shown, it grows within what `plan` has said, and a resumed run makes the same moves."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measurements import shown, walk

from distgrow import budget, every
from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, WSD, Cosine, Span
from distgrow.core.noise_stats import Measuring
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.core.scaling import Group, scaling_policy
from distgrow.core.stages import MinStage, stage_at
from distgrow.growth import Growth
from distgrow.growth.auto import Auto
from distgrow.growth.cabs import CABS
from distgrow.growth.controller import Controller
from distgrow.growth.critical_batch import CriticalBatch
from distgrow.growth.noise_scale import NoiseScale
from distgrow.growth.norm_threshold import NormThreshold
from distgrow.growth.progress_test import ProgressTest
from distgrow.growth.tau_adaptive import TauAdaptive
from distgrow.growth.temperature import Plateau, Temperature

Adaptive = NormThreshold | ProgressTest | CriticalBatch | NoiseScale | CABS | TauAdaptive | Temperature | Auto

sizes = {"start": st.integers(2, 12), "factor": st.sampled_from([1.5, 2.0, 3.0]), "cap": st.integers(12, 200)}
dwells = st.builds(MinStage, samples=st.integers(1, 200), updates=st.integers(1, 9))
FINITE_SUM = {key: st.just(value) for key, value in (("smoothness", 1.0), ("largest_smoothness", 2.0), ("mu", 1.0))}
FINITE_SUM["epsilon"] = st.sampled_from([0.1, 10.0])
tracked = {**sizes, "min_stage": dwells, "stages_at_once": st.integers(1, 3), "confidence": st.sampled_from([0.0, 1.0])}
waiting: st.SearchStrategy[Adaptive] = st.one_of(  # for measurements alone
    st.builds(CriticalBatch, kappa=st.sampled_from([0.1, 1.0]), **tracked),
    st.builds(NoiseScale, **tracked),
    st.builds(CABS, **tracked),
    st.builds(TauAdaptive, **FINITE_SUM, **tracked),
    st.builds(ProgressTest, min_stage=dwells, early=st.sampled_from([None, 1.0]), **sizes),
    st.builds(NormThreshold, norm=st.just("estimated"), every=st.integers(1, 20), **sizes),
    st.builds(Temperature, share=st.just(1.0), lr_max=st.just(5.0), min_stage=dwells, **sizes),
    st.builds(Temperature, plateau=st.builds(Plateau, samples=st.integers(1, 300)), min_stage=dwells, **sizes),
    st.builds(Temperature, share=st.just(1.0), gain=st.just(True), lr_max=st.just(1.0), min_stage=dwells, **sizes),
)
shows = st.tuples(st.floats(-2, 2), st.floats(0, 300), st.floats(-1, 1), st.floats(0.5, 2))
autos = st.builds(
    Auto, early=st.sampled_from([0.01, 0.3]), hold=st.sampled_from([0.3, 0.9]), depth=st.integers(1, 12), **sizes
)
growths = st.one_of(waiting, autos)
scripts = st.lists(st.none() | shows, min_size=1, max_size=40)


def controller(growth: Growth, total: int = 1200, **settings: object) -> Controller:
    """A run of so many samples, on one rank with micro-batches that show noise."""
    given = {"growth": growth, "budget": budget(samples=total), "epoch": 300, "max_micro": 2, "lr": LR(base=0.5)}
    return Controller(**{**given, **settings})  # pyright: ignore[reportArgumentType]


def played(script: list[tuple[float, float, float, float] | None], control: Controller) -> list[tuple[Progress, Plan]]:
    """The run in which update k shows entry k of the script, over and over; where there is none it is skipped."""
    count = iter(range(10**9))

    def outcome(progress: Progress, plan: Plan) -> Outcome:
        show = script[next(count) % len(script)]
        return Outcome(applied=False) if show is None and len(script) > 1 else shown(plan, *(show or ()))

    limit = 20 * control.samples()
    return [at for at, _ in zip(walk(control, outcome), range(limit), strict=False)]


def applied(run: list[tuple[Progress, Plan]]) -> list[tuple[Progress, Plan]]:
    """The updates of a run that moved something."""
    after = [progress.step for progress, _ in run[1:]] + [run[-1][0].step + 1]
    return [at for at, step in zip(run, after, strict=True) if step > at[0].step]


some = st.lists(shows, min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(growths, scripts.filter(any))
def test_batches_only_grow_and_stop_at_the_cap(growth: Adaptive, script: list) -> None:
    control = controller(growth)
    run = played(script, control)
    stages = [plan.stage for _, plan in run]
    assert stages == sorted(stages)
    assert growth.cap is not None
    for progress, plan in run[:-1]:
        assert plan.batch <= growth.cap or plan.batch == control.budget.left(progress, control.epoch)
        assert plan.batch == growth.stage_batch(plan.stage) or plan.batch == control.budget.left(
            progress, control.epoch
        )
    assert sum(plan.batch for _, plan in applied(run)) == 1200


@settings(max_examples=60, deadline=None)
@given(growths, scripts.filter(any))
def test_no_script_grows_sooner_than_the_plan_says_at_fastest_or_further_than_it_checks(
    growth: Adaptive, script: list
) -> None:
    control = controller(growth)
    reach: dict[int, int] = {}
    for stage, batch in control.reach():
        reach[stage] = max(batch, reach.get(stage, 0))
    earliest, share = growth.earliest(control.lr, Span(samples=1200, epoch=300)), control.largest_share()
    for progress, plan in played(script, control):
        stage = min(plan.stage, int(growth.cap_stage))
        position = progress.step if earliest.axis == "steps" else progress.ledger.applied
        assert stage <= stage_at(earliest, 0, position, growth.cap_stage)
        assert plan.batch <= reach[stage]  # every stage that comes is one of them
        assert -(-plan.batch // control.world) <= share


@given(st.builds(MinStage, samples=st.integers(1, 300), updates=st.integers(1, 5)), st.integers(1, 3))
def test_the_soonest_is_that_of_the_best_of_all_ways_up(dwell: MinStage, at_once: int) -> None:
    growth = NoiseScale(start=3, factor=1.7, cap=100, min_stage=dwell, stages_at_once=at_once)
    top, first = int(growth.cap_stage), {}

    def grow_from(stage: int, samples: int) -> None:
        for reached in range(stage + 1):
            first[reached] = min(samples, first.get(reached, samples))
        for above in range(stage + 1, min(stage + at_once, top) + 1):
            batch = growth.stage_batch(stage)
            updates = next(k for k in range(1, 10**4) if dwell.over(k * batch, k, 300))
            grow_from(above, samples + updates * batch)

    grow_from(0, 0)
    earliest = growth.earliest(LR(), Span(samples=1200, epoch=300))
    assert [earliest.end(stage) for stage in range(top)] == [first[stage + 1] for stage in range(top)]
    assert earliest.end(top) == math.inf


@settings(max_examples=50, deadline=None)
@given(growths, some, st.integers(0, 200))
def test_a_run_that_is_written_down_and_read_makes_the_same_moves(growth: Adaptive, script: list, stop: int) -> None:
    control = controller(growth)
    outcome = lambda progress, plan: shown(plan, *script[progress.step % len(script)])  # noqa: E731
    whole = list(walk(control, outcome))
    saved = whole[min(stop, len(whole) - 1)][0]
    read = Progress.from_dict(json.loads(json.dumps(saved.to_dict())))
    assert list(walk(control, outcome, read)) == whole[min(stop, len(whole) - 1) :]


@settings(max_examples=50, deadline=None)
@given(growths, scripts.filter(any))
def test_asked_again_without_news_nothing_moves(growth: Adaptive, script: list) -> None:
    control = controller(growth)
    for progress, plan in played(script, control):
        assert control.advance(progress) is progress
        skipped = progress.after(plan, Outcome(applied=False))
        assert control.advance(skipped) is skipped


@settings(max_examples=30, deadline=None)
@given(waiting, some)
def test_a_forecast_makes_no_move(growth: Adaptive, script: list) -> None:
    control = controller(growth, 1500)
    outcome = lambda progress, plan: shown(plan, *script[progress.step % len(script)])  # noqa: E731
    for progress, plan in list(walk(control, outcome))[::7]:
        strides = list(control.forecast(progress))
        assert {stride.plan.stage for stride in strides} == {plan.stage}
        left = control.budget.left(progress, control.epoch)
        assert sum(stride.plan.batch * stride.updates for stride in strides) == left


@settings(max_examples=50, deadline=None)
@given(waiting, some)
def test_stages_are_as_long_as_the_dwell(growth: Adaptive, script: list) -> None:
    if isinstance(growth, NormThreshold) or getattr(growth, "early", None) is not None:
        return
    dwell: MinStage = growth.min_stage  # pyright: ignore[reportAttributeAccessIssue]
    run = played(script, controller(growth))
    begins = [progress for (_, before), (progress, plan) in pairwise(run) if plan.stage > before.stage]
    for before, after in pairwise([Progress(), *begins]):
        assert after.ledger.applied - before.ledger.applied >= (dwell.samples or 0)
        assert after.step - before.step >= dwell.updates


@given(waiting)
def test_without_a_cap_they_are_refused(growth: Adaptive) -> None:
    with pytest.raises(ConfigError, match=r"set growth\.cap"):
        controller(growth.model_copy(update={"cap": None}))


@given(growths)
def test_stage_lengths_from_elsewhere_are_refused(growth: Adaptive) -> None:
    with pytest.raises(ConfigError, match=f"growth.kind={growth.name} sets its own stage lengths: remove stages"):
        controller(growth, stages=every(samples=100))


@pytest.mark.parametrize("growth", [ProgressTest(cap=64), NoiseScale(cap=64), CriticalBatch(kappa=1.0, cap=64)])
def test_a_budget_in_steps_has_no_end_for_a_decay(growth: Growth) -> None:
    controller(growth, budget=budget(steps=50)).check()
    with pytest.raises(ConfigError, match=r"beside lr\.decay .* give budget\.epochs"):
        controller(growth, budget=budget(steps=50), lr=LR(decay=Cosine()))


@settings(max_examples=30, deadline=None)
@given(waiting, some, st.integers(1, 60))
def test_a_budget_in_steps_or_sfo_is_kept_too(growth: Adaptive, script: list, amount: int) -> None:
    outcome = lambda progress, plan: shown(plan, *script[progress.step % len(script)])  # noqa: E731
    run = list(walk(controller(growth, budget=Budget(steps=amount)), outcome))
    assert len(run) == amount
    run = list(walk(controller(growth, budget=Budget(sfo=10 * amount)), outcome))
    assert sum(plan.batch for _, plan in run) == 10 * amount


# ── what is refused before a run ────────────────────────────────────────────────────────────────────────────────


MEASURING = [
    NoiseScale(start=1, cap=64),
    CriticalBatch(start=1, kappa=1.0, cap=64),
    CABS(start=1, cap=8),
    TauAdaptive(start=1, cap=8, smoothness=1.0, largest_smoothness=2.0, mu=1.0, epsilon=0.1),
    NormThreshold(start=1, cap=8, norm="estimated"),
    Temperature(start=1, cap=8, share=1.0, lr_max=9.0),
]


@pytest.mark.parametrize("growth", MEASURING)
def test_a_batch_that_never_shows_noise_is_refused(growth: Adaptive) -> None:
    with pytest.raises(ConfigError, match=r"one sample on one rank does not show; raise growth\.start to at least 2"):
        controller(growth).check()
    controller(growth.model_copy(update={"start": 2}), world=2).check()
    with pytest.raises(ConfigError, match="smaller than world=2") as refused:
        controller(growth, world=2).check()
    assert "noise" not in str(refused.value)
    controller(growth.model_copy(update={"start": 2}), max_micro=64).check()


@pytest.mark.parametrize("growth", MEASURING)
def test_where_one_rank_takes_a_batch_at_once_it_is_cut_in_two_to_be_measured(growth: Adaptive) -> None:
    control = controller(growth.model_copy(update={"start": 2}), max_micro=64)
    assert (control.plan(Progress()).accum, control.plan(Progress()).window) == (2, 20)
    often = replace(control, measuring=Measuring(every=1, window=7))
    assert [often.plan(Progress(step=step)).window for step in range(3)] == [7, 7, 7]


def test_the_largest_batch_in_reach_must_fit_the_training_set() -> None:
    growth = NoiseScale(start=8, cap=512, min_stage=MinStage(samples=100))
    with pytest.raises(ConfigError, match="exceeds the 300 samples of the training set"):
        controller(growth, total=4000).check()
    controller(growth, total=300).check()  # it ends before that batch


def test_ranks_that_follow_the_stages_must_fit_the_smallest_last_batch() -> None:
    growth = ProgressTest(start=4, cap=64)
    wants = scaling_policy([1, 8])
    group = Group(scaling_policy=wants, asked=1)
    with pytest.raises(ConfigError, match=r"wants 8 ranks, but the budget may end with a batch of growth\.start=4"):
        controller(growth, group=group).check()
    controller(growth, group=Group(scaling_policy=scaling_policy([1, 4]), asked=1)).check()


def test_micro_batches_of_one_row_cannot_take_any_last_batch_on_several_ranks() -> None:
    with pytest.raises(ConfigError, match=r"raise engine\.max_micro to 2"):
        controller(ProgressTest(start=4, cap=64), world=2, max_micro=1).check()


def test_a_decay_runs_beside_the_moves() -> None:
    control = controller(
        ProgressTest(start=8, cap=64, min_stage=MinStage(updates=5)), lr=LR(base=1.0, decay=WSD(decay=0.5))
    )
    taken = 1.0
    for progress, plan in walk(control, lambda progress, plan: shown(plan, product=-1.0)):
        fall = min(1.0, 2 - progress.ledger.applied / 600)
        taken = min(1.0, 64 / (8 * 2.0**plan.stage))
        assert plan.lr == pytest.approx(fall * taken)
    assert not math.isclose(taken, 1.0)
