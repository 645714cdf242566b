"""Growth that follows a measured batch size stands next to it, by closed forms, notebooks and noisy quadratics."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from measurements import Quadratic, shown, walk

from distgrow import budget, constant_lr, sqrt_lr
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, StepDecay
from distgrow.core.noise_stats import Mean, Measuring, Noise
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.core.stages import MinStage
from distgrow.growth.cabs import CABS
from distgrow.growth.controller import Controller
from distgrow.growth.critical_batch import CriticalBatch
from distgrow.growth.noise_scale import NoiseScale
from distgrow.theory.noise import critical_batch_now

Tracker = CriticalBatch | NoiseScale | CABS
EPOCH = 10**12  # so large that samples are as good as drawn endlessly


def controller(growth: Tracker, lr: LR | None = None, total: int = 6000) -> Controller:
    return Controller(growth=growth, lr=lr or constant_lr(0.1), budget=budget(samples=total), epoch=EPOCH, max_micro=2)


def known(grad_sq: float, variance: float, loss: float = 1.0, errors: float = 0.0) -> Noise:
    """Means that have settled, with relative standard errors of about `errors`, after a hundred updates of a stage."""
    noise = Noise(fresh=100)
    for k in range(100):
        sign = 1 if k % 2 else -1
        grads = noise.grad_sq.add(grad_sq * (1 + sign * errors * 10), 1.0)
        variances = noise.variance.add(variance * (1 + sign * errors * 10), 1.0)
        noise = replace(noise, grad_sq=grads, variance=variances, loss=noise.loss.add(loss, 1.0))
    return noise


def settled(noise: Noise, stage: int = 0) -> Progress:
    """A stage that has been long enough."""
    return Progress(step=200, samples=3200, stage=stage, stage_samples=EPOCH, stage_step=200, noise=noise)


# ── which stage ──────────────────────────────────────────────────────────────────────────────────────────────────


targets = st.floats(1.0, 4000.0)


@given(targets, st.integers(0, 6), st.sampled_from([1.0, 1.1, 1.5]), st.integers(1, 9))
def test_the_stage_is_the_nearest_by_logarithms_but_none_below_and_not_too_many_above(
    target: float, stage: int, hysteresis: float, at_once: int
) -> None:
    growth = NoiseScale(start=8, cap=8 * 2**6, confidence=0.0, hysteresis=hysteresis, stages_at_once=at_once)
    exact = math.log2(target / (8 * hysteresis))
    assume(abs(exact - math.floor(exact) - 0.5) > 1e-6)
    wanted = min(max(stage, math.floor(exact + 0.5)), 6, stage + at_once)
    assert controller(growth).advance(settled(known(1.0, target), stage)).stage == wanted


@pytest.mark.parametrize("offset", [1e-9, -1e-9])
def test_the_edge_between_two_stages_is_the_middle_times_the_hysteresis(offset: float) -> None:
    growth = NoiseScale(start=8, cap=512, confidence=0.0, hysteresis=1.25)
    edge = 1.25 * math.sqrt(8 * 16) * (1 + offset)
    assert controller(growth).advance(settled(known(1.0, edge))).stage == (offset > 0)


def test_between_two_stages_no_batch_costs_an_eighth_more_than_the_critical_one() -> None:
    growth = CriticalBatch(start=8, cap=8 * 2**12, kappa=1.0, confidence=0.0, hysteresis=1.0, stages_at_once=12)
    control = controller(growth)
    ratios = [
        growth.stage_batch(control.advance(settled(known(1.0, b))).stage) / b for b in np.geomspace(8, 20_000, 300)
    ]
    assert max(ratio**2 / (2 * ratio - 1) for ratio in ratios) < 1.25  # N(b)/N* of theory.cost_of_wrong_batch
    assert min(ratios) == pytest.approx(2**-0.5, rel=0.05)


@given(st.floats(0.01, 10), st.floats(0.1, 1000), st.floats(0.0, 3.0))
def test_confidence_takes_the_end_of_both_intervals_that_makes_the_batch_small(
    grad_sq: float, variance: float, confidence: float
) -> None:
    growth = NoiseScale(start=1, cap=2**20, confidence=confidence)
    noise = known(grad_sq, variance, errors=0.05)
    lower, upper = growth.ends(noise)
    assert lower == pytest.approx(variance * (1 - confidence * 0.0503), rel=1e-3)
    assert upper == pytest.approx(grad_sq * (1 + confidence * 0.0503), rel=1e-3)


def test_a_gradient_lost_in_noise_goes_up_one_stage_at_a_time() -> None:
    for growth in (
        NoiseScale(start=8, cap=512, stages_at_once=5),
        CriticalBatch(start=8, cap=512, stages_at_once=5, kappa=1.0),
    ):
        assert controller(growth).advance(settled(known(-1.0, 3.0))).stage == 1
        assert controller(growth).advance(settled(known(-1.0, -3.0))).stage == 0  # no noise is known either


@pytest.mark.parametrize("growth", [NoiseScale(cap=64), CriticalBatch(cap=64, kappa=1.0), CABS(cap=64)])
def test_nothing_moves_before_enough_updates_were_measured(growth: Tracker) -> None:
    control, seen = controller(growth), known(1e-9, 1e9)
    for fresh in range(10):
        assert control.advance(settled(replace(seen, fresh=fresh))).stage == 0
    assert control.advance(settled(seen)).stage == 2
    short = replace(settled(seen), stage_samples=EPOCH // 10 - 1)
    assert control.advance(short).stage == 0


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 40),
    st.integers(1, 200), st.integers(1, 12), st.integers(1, 3), st.sampled_from([0.0, 1.0]), st.integers(0, 3),
)  # fmt: skip
def test_the_run_is_that_of_a_notebook(
    seed: int, length: int, samples: int, updates: int, at_once: int, confidence: float, blind: int
) -> None:
    script = np.random.default_rng(seed).uniform((-0.5, 0.0), (2.0, 200.0), size=(length, 2)).tolist()
    growth = CriticalBatch(
        start=4, cap=50, kappa=0.5, stages_at_once=at_once, confidence=confidence, hysteresis=1.2,
        min_stage=MinStage(samples=samples, updates=updates),
    )  # fmt: skip
    found, done, stage, since, fresh, step = [], 0, 0, 0, 0, 0
    values: list[tuple[float, float]] = []
    batches: list[int] = []
    while done < 1500:
        if since >= samples and fresh >= updates:
            weights = 0.99 ** np.arange(len(values) - 1, -1, -1.0) * batches
            means = np.average(values, axis=0, weights=weights)
            share = (weights**2).sum() / weights.sum() ** 2
            spread = np.maximum(0, np.average(np.square(values), axis=0, weights=weights) - means**2)
            errors = np.sqrt(spread * share / (1 - share)) if share < 1 else np.full(2, math.inf)
            grad_sq, variance = means
            if confidence:
                grad_sq, variance = grad_sq + errors[0], variance - errors[1]
            grad_sq += means[1] / EPOCH
            if variance > 0:
                target = math.inf if grad_sq <= 0 else 0.5 * variance / grad_sq
                top = stage + 1 if stage >= 4 or target == math.inf else min(stage + at_once, 4)
                while stage < top and target >= 1.2 * 4 * 2 ** (stage + 0.5):
                    stage, since, fresh = stage + 1, 0, 0
        batch = min(50, 4 * 2**stage)
        batch = batch if 1500 - done - batch >= 4 or 1500 - done == batch else 1500 - done
        found.append((stage, batch, 0.1 * min(1.0, 50 / (4 * 2**stage)) ** 0.5))
        if step % 4 >= blind:
            values.append(script[step % len(script)])
            batches.append(batch)
            fresh += 1
        step, since, done = step + 1, since + batch, done + batch

    def outcome(progress: Progress, plan: Plan) -> Outcome:
        return shown(plan, *script[progress.step % len(script)]) if progress.step % 4 >= blind else shown(plan)

    run = [(plan.stage, plan.batch, plan.lr) for _, plan in walk(controller(growth, total=1500), outcome)]
    assert [(stage, batch) for stage, batch, _ in run] == [(stage, batch) for stage, batch, _ in found]
    assert [rate for *_, rate in run] == pytest.approx([rate for *_, rate in found])


# ── critical batch ──────────────────────────────────────────────────────────────────────────────────────────────


@given(st.floats(0.01, 1.9), st.floats(0.5, 500))
def test_a_known_smoothness_gives_the_critical_batch_of_the_bound(lr: float, ratio: float) -> None:
    growth = CriticalBatch(start=1, cap=2**30, smoothness=1.0, confidence=0.0, stages_at_once=40, hysteresis=1.0)
    exact = 2 * lr / (2 - lr) * ratio
    assume(abs(math.log2(exact) % 1 - 0.5) > 1e-3)
    found = controller(growth, constant_lr(lr)).advance(settled(known(1.0, ratio))).stage
    assert found == max(0, round(math.log2(exact)))


def test_beyond_the_cap_stages_go_up_one_by_one_and_the_learning_rate_falls_with_the_root_of_what_is_left_out() -> None:
    growth = CriticalBatch(start=8, cap=64, kappa=1.0, min_stage=MinStage(updates=5), confidence=0.0)
    control = controller(growth)
    run = list(walk(control, lambda progress, plan: shown(plan, 1.0, 1024.0)))
    stages = list(dict.fromkeys(plan.stage for _, plan in run))
    assert stages == [0, 2, 3, 4, 5, 6, 7]  # 8 → 32 → 64, then as if 128, … 1024
    for _, plan in run:
        assert plan.batch <= 64 or plan is run[-1][1]
        assert plan.lr == pytest.approx(0.1 * min(1.0, 64 / (8 * 2.0**plan.stage)) ** 0.5)


def test_the_fall_at_the_cap_does_not_lower_the_batch_that_is_followed() -> None:
    fixed = CriticalBatch(start=8, cap=64, kappa=0.2 / 1.9, min_stage=MinStage(updates=5))
    smooth = CriticalBatch(start=8, cap=64, smoothness=1.0, min_stage=MinStage(updates=5))
    shows: Callable[[Progress, Plan], Outcome] = lambda progress, plan: shown(plan, 1.0, 10_000.0)  # noqa: E731
    runs = [[plan for _, plan in walk(controller(growth), shows)] for growth in (fixed, smooth)]
    assert [plan.stage for plan in runs[0]] == [plan.stage for plan in runs[1]]
    assert max(plan.stage for plan in runs[0]) > 3


def test_a_learning_rate_that_would_reach_two_over_the_smoothness_is_refused() -> None:
    controller(CriticalBatch(cap=64, smoothness=19.9)).check()
    with pytest.raises(ConfigError, match=r"growth.smoothness=20.1: the learning rate would reach 2/L, 0.1 of 0.0995"):
        controller(CriticalBatch(cap=64, smoothness=20.1)).check()
    with pytest.raises(ConfigError, match=r"0.2 of 0.198;.*or growth.cap"):
        controller(CriticalBatch(cap=64, smoothness=10.1), sqrt_lr(0.1)).check()


@pytest.mark.parametrize("constants", [{}, {"kappa": 1.0, "smoothness": 1.0}])
def test_it_needs_one_constant_or_the_other(constants: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="exactly one of kappa, smoothness"):
        CriticalBatch(**{"cap": 64, **constants})


@pytest.mark.parametrize("distance", [3.0, 1.0, 0.3])
def test_at_a_point_that_hardly_moves_it_ends_next_to_the_known_critical_batch(distance: float) -> None:
    growth = CriticalBatch(start=4, cap=4096, kappa=0.5, min_stage=MinStage(updates=30), hysteresis=1.0)
    exact = max(4.0, 0.5 * 20.0 / distance**2)
    for seed in range(3):
        problem = Quadratic(1.0, variance=20.0, distance=distance, seed=seed, dimensions=200)
        *_, (_, last) = walk(controller(growth, constant_lr(1e-7), total=8000 if distance >= 1 else 80_000), problem)
        assert abs(math.log2(growth.stage_batch(last.stage) / exact)) <= 1


def test_along_a_noisy_quadratic_the_batch_keeps_up_with_the_exact_critical_batch() -> None:
    growth = CriticalBatch(start=4, cap=512, smoothness=1.0, min_stage=MinStage(updates=30), hysteresis=1.0)
    apart: list[float] = []
    for seed in range(3):
        problem = Quadratic(1.0, variance=4000.0, distance=40.0, seed=seed, dimensions=200)
        control = replace(controller(growth, constant_lr(0.004), total=120_000), measuring=Measuring(window=30))
        for _, plan in walk(control, problem):
            full_sq = float((problem.theta**2).sum())
            exact = critical_batch_now(4000.0, full_sq, 0.004, 1.0)
            apart.append(math.log2(plan.batch / min(512.0, max(4.0, exact))))
    assert abs(float(np.median(apart))) < 1
    assert np.quantile(np.abs(apart), 0.95) <= 2


# ── noise scale and CABS ────────────────────────────────────────────────────────────────────────────────────────


def test_gns_stops_at_the_cap_and_leaves_the_learning_rate() -> None:
    growth = NoiseScale(start=8, cap=64, min_stage=MinStage(updates=5))
    run = list(walk(controller(growth), lambda progress, plan: shown(plan, 1.0, 9999.0)))
    assert {plan.lr for _, plan in run} == {0.1}
    assert max(plan.stage for _, plan in run) == 3


@given(st.floats(0.001, 10), st.floats(0.1, 10_000), st.floats(0.01, 10))
def test_cabs_is_learning_rate_times_variance_over_loss(lr: float, variance: float, loss: float) -> None:
    growth = CABS(start=1, cap=2**30, stages_at_once=40, hysteresis=1.0, confidence=0.0)
    exact = math.log2(lr * variance / loss)
    assume(abs(exact % 1 - 0.5) > 1e-6)
    progress = settled(known(1.0, variance, loss))
    assert controller(growth, constant_lr(lr)).advance(progress).stage == max(0, math.floor(exact + 0.5))


def test_cabs_takes_the_upper_end_of_the_loss() -> None:
    noise = known(1.0, 640.0)
    for loss in (0.5, 1.5) * 50:  # a mean of 1 with a standard error of 0.035
        noise = replace(noise, loss=noise.loss.add(loss, 1.0))
    edge = 0.1 * 640 / (1 + noise.loss.error)
    for factor, stage in [(0.999, 1), (1.001, 0)]:
        start = edge * factor / math.sqrt(2)
        growth = CABS(start=1000, cap=4000, hysteresis=1.0, confidence=1.0)
        scaled = replace(noise, variance=noise.variance.add(0, 1.0))
        progress = settled(replace(scaled, variance=known(1.0, 640.0 * 1000 / start).variance))
        assert controller(growth).advance(progress).stage == stage


def test_cabs_follows_the_learning_rate_as_it_decays() -> None:
    growth = CABS(start=1, cap=2**20, stages_at_once=40, hysteresis=1.0, confidence=0.0)
    decay = StepDecay.model_validate({"every": {"samples": 1000}, "factor": 0.25})
    later = replace(settled(known(1.0, 640.0)), ledger=replace(Progress().ledger, applied=1000))
    assert controller(growth, LR(base=0.1, decay=decay)).advance(later).stage == 4  # 0.1/4 · 640 = 16


def test_cabs_does_not_move_by_a_loss_that_is_not_positive() -> None:
    assert controller(CABS(start=4, cap=64)).advance(settled(known(1.0, 1e6, loss=-0.5))).stage == 0


def test_a_mean_loss_is_kept_of_the_measured_updates_alone() -> None:
    control = controller(CABS(start=8, cap=8))
    losses = [3.0, 5.0, 8.0]
    progress = Progress()
    for loss in losses:
        plan = control.plan(progress)
        progress = progress.after(plan, shown(plan, 1.0, 1.0, loss=loss))
        progress = progress.after(replace(plan, window=0), shown(plan, loss=99.0))
    mean = Mean()
    for loss in losses:
        mean = mean.add(loss, 0.99, 8)
    assert progress.noise.loss == mean
