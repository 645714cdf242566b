"""The norm threshold and the progress test move where their sources say, to the last bit, and never else."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measurements import Quadratic, probed_walk, shown, walk

from distgrow import budget, constant_lr, factor_lr
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR
from distgrow.core.noise_stats import Mean, Measuring
from distgrow.core.progress import Outcome, Progress
from distgrow.core.stages import MinStage
from distgrow.growth.controller import Controller
from distgrow.growth.norm_threshold import NormThreshold
from distgrow.growth.progress_test import ProgressTest


def norm_run(growth: NormThreshold, lr: LR | None = None, total: int = 20_000) -> Controller:
    return Controller(growth=growth, lr=lr or LR(), budget=budget(samples=total), epoch=1000, max_micro=4)


# ── norm threshold ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_published_figures_are_the_default() -> None:
    growth = NormThreshold()
    assert (growth.start, growth.factor, growth.epsilon, growth.every, growth.cap) == (8, 2.0, 0.5, 1000, 4096)
    control = Controller(growth=growth, budget=budget(samples=10**7), epoch=50_000)
    rates = [control.rate(Progress(stage=stage), growth.stage_batch(stage)) for stage in range(12)]
    assert rates == pytest.approx([0.1 * 1.4 ** min(stage, 9) for stage in range(12)])  # frozen at the cap


@given(st.integers(0, 8), st.sampled_from(["published", "critical"]))
def test_a_stage_ends_at_its_threshold_and_not_a_bit_above_it(stage: int, threshold: str) -> None:
    growth = NormThreshold(start=8, cap=8 * 2**9, epsilon=0.5, every=10, threshold=threshold)  # pyright: ignore[reportArgumentType]
    control = norm_run(growth, factor_lr(0.1, 1.3))
    level = 0.5 / math.sqrt(2**stage) if threshold == "published" else 0.5 * (1.3 / 2) ** (stage / 2)
    assert growth.level(stage, control.lr) == pytest.approx(level)
    level = growth.level(stage, control.lr)
    at = Progress(stage=stage, step=30, stage_step=10)
    for norm, moves in [(level, 1), (math.nextafter(level, 1), 0), (0.0, 1), (math.nan, 0), (math.inf, 0)]:
        assert control.advance(control.after_probe(at, norm, 1)).stage == stage + moves


def test_it_compares_every_so_many_updates_and_asks_for_a_probe_then_alone() -> None:
    growth = NormThreshold(start=8, cap=64, every=7)
    control = norm_run(growth, total=1000)
    asked = [progress.step for progress, _ in walk(control, lambda *_: Outcome()) if control.probe_due(progress)]
    assert asked == list(range(7, 125, 7))
    run = list(probed_walk(control, lambda _: 0.0))
    begins = {plan.stage: progress.step for progress, plan in reversed(run)}
    assert begins == {0: 0, 1: 7, 2: 14, 3: 21}
    assert run[-1][0].ledger.probe == 3  # none at the cap


def test_once_the_norm_is_known_it_is_not_asked_for_again() -> None:
    control = norm_run(NormThreshold(start=8, cap=64, every=7))
    progress = Progress(step=7, stage_step=7)
    assert control.probe_due(progress)
    assert not control.probe_due(control.after_probe(progress, 9.0, 1000))


def test_an_update_that_is_skipped_does_not_go_up_a_second_stage() -> None:
    growth = NormThreshold(start=8, cap=64, every=7)
    control = norm_run(growth)
    progress = control.after_probe(Progress(step=7, stage_step=7), 0.0, 1000)
    grown = control.advance(progress)
    assert grown.stage == 1
    again = control.after(grown, control.plan(grown), Outcome(applied=False))
    assert not control.probe_due(again)
    assert control.advance(again).stage == 1


def test_a_norm_that_was_measured_before_is_not_taken_for_the_present_one() -> None:
    growth = NormThreshold(start=8, cap=64, every=7)
    control = norm_run(growth)
    old = replace(control.after_probe(Progress(step=7, stage_step=7), 0.0, 1000), step=14)
    assert control.advance(old).stage == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.integers(1, 9))
def test_with_the_estimated_norm_the_run_is_that_of_a_notebook(squares: list[float], every: int) -> None:
    growth = NormThreshold(start=4, cap=32, every=every, epsilon=0.6, norm="estimated", updates=6)
    control = replace(norm_run(growth, total=600), max_micro=1, measuring=Measuring(window=100))
    stage, step, since, mean, found = 0, 0, 0, Mean(), []
    done = 0
    while done < 600:
        if step % every == 0 and since > 0 and stage < 3:
            norm = math.sqrt(max(0.0, mean.value))
            if since >= 6 and norm <= 0.6 / math.sqrt(2**stage):
                stage, since = stage + 1, 0
        batch = 4 * 2**stage
        batch = batch if 600 - done - batch >= 4 or 600 - done == batch else 600 - done
        found.append((stage, batch))
        mean = mean.add(squares[step % len(squares)], 0.99, batch)
        step, since, done = step + 1, since + 1, done + batch
    outcome = lambda progress, plan: shown(plan, squares[progress.step % len(squares)], 5.0)  # noqa: E731
    run = [(plan.stage, plan.batch) for _, plan in walk(control, outcome)]
    assert run == found


def test_an_estimated_norm_is_not_compared_before_enough_updates_have_shown_it() -> None:
    growth = NormThreshold(start=4, cap=32, every=1, epsilon=0.5, norm="estimated")
    control = replace(norm_run(growth, total=600), max_micro=1, measuring=Measuring(window=100))
    stages = [progress.stage for progress, _ in walk(control, lambda _, plan: shown(plan, 0.0, 5.0))]
    assert stages[:45] == [0] * 20 + [1] * 20 + [2] * 5


def test_noise_that_is_measured_less_often_than_a_norm_is_compared_is_refused() -> None:
    growth = NormThreshold(start=4, cap=32, every=50, norm="estimated")
    for every, reasons in [(50, 0), (51, 1)]:
        found = replace(norm_run(growth), measuring=Measuring(every=every)).problems(0, 4)
        assert len(found) == reasons
        assert all("run.noise.every=51" in reason and "every 50 updates" in reason for reason in found)


@pytest.mark.parametrize(("every", "count"), [(7, 17), (5, 24)])  # the 125th update is the last
def test_of_a_run_the_plan_tells_how_many_probes_there_are(every: int, count: int) -> None:
    growth = NormThreshold(start=8, cap=64, every=every)
    control = norm_run(growth, total=1000)
    never, always = list(probed_walk(control, lambda _: 9.0)), list(probed_walk(control, lambda _: 0.0))
    assert control.probe_count(len(never), 0) == never[-1][0].ledger.probe == count
    assert control.probe_count(len(always), 3) == always[-1][0].ledger.probe
    assert norm_run(growth.model_copy(update={"norm": "estimated"})).probe_count(1000, 0) == 0


# ── progress test ───────────────────────────────────────────────────────────────────────────────────────────────


def progress_run(growth: ProgressTest, total: int = 5000) -> Controller:
    return Controller(growth=growth, lr=LR(base=0.4), budget=budget(samples=total), epoch=200)


def test_it_fires_at_zero_and_not_a_bit_above_it() -> None:
    control = progress_run(ProgressTest(start=8, cap=64))
    for product, moves in [(0.0, 1), (-1e-300, 1), (1e-300, 0), (math.nan, 0)]:
        run = walk(control, lambda progress, plan, shows=product: shown(plan, product=shows))
        stages = [plan.stage for _, plan in zip(range(30), (plan for _, plan in run), strict=False)]
        assert stages[24] == 0  # an epoch is 25 updates
        assert stages[25] == moves


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=50), st.integers(1, 300), st.integers(1, 30),
    st.sampled_from([0.0, 1.0]), st.sampled_from([None, 2.0]), st.sampled_from([40, 64]),
)  # fmt: skip
def test_the_run_is_that_of_a_notebook(
    products: list[float], samples: int, updates: int, confidence: float, early: float | None, cap: int
) -> None:
    dwell = MinStage(samples=samples, updates=updates)
    growth = ProgressTest(start=8, cap=cap, min_stage=dwell, confidence=confidence, early=early)
    found, since, seen, stage, step, done = [], 0, [], 0, 0, 0
    while done < 1500:
        if len(seen) >= updates:
            weights = np.arange(1.0, len(seen) + 1)
            mean = np.average(seen, weights=weights)
            share = (weights**2).sum() / weights.sum() ** 2
            spread = max(0.0, np.average(np.square(seen), weights=weights) - mean**2)
            error = math.sqrt(spread * share / (1 - share)) if share < 1 else math.inf
            errors = confidence if since >= samples else early
            if errors is not None and mean + (errors * error if errors else 0.0) <= 0:
                stage, since, seen = stage + 1, 0, []
        batch = min(cap, 8 * 2**stage)
        batch = batch if 1500 - done - batch >= 8 or 1500 - done == batch else 1500 - done
        found.append((stage, batch, 0.4 * min(1.0, cap / (8 * 2**stage))))
        seen.append(products[step % len(products)])
        step, since, done = step + 1, since + batch, done + batch
    outcome = lambda progress, plan: shown(plan, product=products[progress.step % len(products)])  # noqa: E731
    run = [(plan.stage, plan.batch, plan.lr) for _, plan in walk(progress_run(growth, 1500), outcome)]
    if any(abs(value) < 1e-9 for value in products):
        return  # a sum that is zero but for round-off
    assert [(stage, batch) for stage, batch, _ in run] == [(stage, batch) for stage, batch, _ in found]
    assert [rate for *_, rate in run] == pytest.approx([rate for *_, rate in found])


def test_the_product_is_asked_for_at_every_update() -> None:
    control = progress_run(ProgressTest(start=8, cap=64))
    assert all(plan.product for _, plan in walk(control, lambda progress, plan: shown(plan)))


def test_the_learning_rate_does_not_fall_for_ever() -> None:
    growth = ProgressTest(start=8, cap=64, min_stage=MinStage(updates=1))
    last = [plan for _, plan in walk(progress_run(growth), lambda progress, plan: shown(plan, product=-1.0))][-1]
    assert 1e-13 < last.lr / 0.4 < 1e-12
    assert last.stage == growth.last_stage


def test_it_waits_while_updates_make_progress_and_fires_where_they_undo_each_other() -> None:
    growth = ProgressTest(start=8, cap=512, min_stage=MinStage(samples=800))
    for seed in range(8):
        problem = Quadratic(1.0, variance=8.0, distance=2.0, seed=seed, dimensions=200)
        control = Controller(
            growth=growth, lr=constant_lr(0.02), budget=budget(samples=20_000), epoch=10**6, max_micro=4
        )
        stages = [plan.stage for _, plan in walk(control, problem)]
        assert stages[101] == 0  # |∇f|² has come from 4 to 0.1 in one dwell; noise undoes 0.02 of it
        assert stages[-1] > 0


@pytest.mark.parametrize("growth", [ProgressTest(cap=64), NormThreshold(cap=64)])
def test_figures_that_cannot_be_are_refused(growth: ProgressTest | NormThreshold) -> None:
    wrong: dict[str, list[object]] = {
        "epsilon": [0.0, -0.5, math.inf], "every": [0, -1], "confidence": [-1.0], "early": [0.0],
        "dwell": [{"epochs": 0.0}, {"updates": 0}, {"epochs": 1.0, "samples": 5}], "start": [0, 65],
    }  # fmt: skip
    for name, values in wrong.items():
        for value in values if name in type(growth).model_fields else ():
            with pytest.raises((ValueError, ConfigError), match=name):
                type(growth).model_validate({**growth.model_dump(), name: value})
