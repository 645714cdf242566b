"""Temperature growth takes the largest batch that its three limits allow at every update."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measurements import shown, steady, walk

from distgrow import budget, constant_lr
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, WSD, Cosine, Decay, DecayEvery, Span, StepDecay
from distgrow.core.noise_stats import Noise, Trend
from distgrow.core.progress import Ledger, Outcome, Progress
from distgrow.core.stages import MinStage, Stages
from distgrow.growth import Growth
from distgrow.growth.adascale import AdaScale
from distgrow.growth.controller import Controller
from distgrow.growth.temperature import Plateau, Temperature
from distgrow.theory.noise import adascale_gain

EPOCH = 10**12
DECAYS: list[Decay] = [
    Cosine(), Cosine(warmup=0.2, final=0.02), WSD(decay=0.7), StepDecay(every=DecayEvery(samples=700), factor=0.4)
]  # fmt: skip


def controller(growth: Growth, lr: LR, total: int = 6000, stages: Stages | None = None) -> Controller:
    return Controller(
        growth=growth, lr=lr, budget=budget(samples=total), epoch=EPOCH, max_micro=2, stages=stages or Stages()
    )


# ── a temperature set beforehand ────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(DECAYS), st.sampled_from([1.0, 0.5, 0.7]), st.sampled_from([None, 0.25, 3.0]),
    st.sampled_from([(8, 2.0, 512), (3, 1.5, 100), (10, 3.0, 10)]),
)  # fmt: skip
def test_every_batch_is_the_largest_stage_that_is_stable_and_the_learning_rate_is_the_temperatures(
    decay: Decay, power: float, lr_max: float | None, sizes: tuple[int, float, int]
) -> None:
    start, factor, cap = sizes
    growth = Temperature(start=start, factor=factor, cap=cap, power=power, lr_max=lr_max)
    control = controller(growth, LR(base=0.2, decay=decay), 3000)
    span, limit = Span(samples=3000, epoch=EPOCH), lr_max or 0.2
    for progress, plan in walk(control, lambda *_: Outcome()):
        samples = progress.ledger.applied
        temperature = 0.2 / start**power * decay.fall(samples, span)
        stable = [b for b in (growth.stage_batch(m) for m in range(40)) if temperature * b**power <= limit * (1 + 1e-9)]
        batch = growth.stage_batch(plan.stage)
        assert batch == max([start, *stable]) or samples == 3000 - plan.batch
        assert plan.lr == pytest.approx(
            decay.warm(samples, plan.batch, span) * temperature * min(plan.batch, batch) ** power
        )
        assert plan.lr <= limit * (1 + 1e-9)


def test_what_follows_from_the_budget_is_planned_exactly() -> None:
    growth = Temperature(start=8, cap=128, lr_max=1.0)
    control = controller(growth, LR(base=0.2, decay=Cosine()))
    assert not growth.adaptive
    planned = [(stage, batch) for stage, batch, updates in control.outline(Progress()) for _ in range(updates)]
    assert planned == [(plan.stage, plan.batch) for _, plan in walk(control, lambda *_: Outcome())]


# ── limits that are measured ────────────────────────────────────────────────────────────────────────────────────


@given(st.floats(1, 500), st.sampled_from([0.5, 1.0, 2.0]), st.floats(0.05, 1.0), st.integers(0, 5))
def test_the_batch_stays_within_its_share_of_the_noise_scale(
    scale: float, share: float, fallen: float, stage: int
) -> None:
    growth = Temperature(start=4, cap=256, share=share, lr_max=0.8, confidence=0.0)
    decay = WSD(decay=1.0)
    control = controller(growth, LR(base=0.2, decay=decay), 10**6)
    samples = int((1 - fallen) * 10**6)
    begin = Progress(stage=stage, stage_samples=10**12, stage_step=99, noise=steady(1.0, scale))
    found = control.advance(replace(begin, ledger=Ledger(applied=samples))).stage
    temperature = 0.2 / 4 * decay.fall(samples, Span(samples=10**6, epoch=EPOCH))
    wanted = stage
    for later in range(stage + 1, 7):
        batch = growth.stage_batch(later)
        if batch <= share * scale and temperature * batch <= 0.8 and wanted == later - 1:
            wanted = later
    assert found == wanted


def test_a_gradient_lost_in_noise_lets_the_batch_grow_stage_by_stage() -> None:
    growth = Temperature(start=4, cap=256, share=1.0, lr_max=100.0)
    begin = Progress(stage_samples=10**12, stage_step=99, noise=steady(-1.0, 5.0))
    assert controller(growth, LR(base=0.2)).advance(begin).stage == 1


def test_with_the_gain_the_learning_rate_is_the_gains_and_never_above_its_limit() -> None:
    growth = Temperature(start=4, cap=64, gain=True, lr_max=0.5, min_stage=MinStage(updates=5))
    control = controller(growth, LR(base=0.2, decay=Cosine()), 4000)
    span = Span(samples=4000, epoch=EPOCH)
    for progress, plan in walk(control, lambda progress, plan: shown(plan, 1.0, 40.0)):
        fall = Cosine().fall(progress.ledger.applied, span)
        ratio = min(plan.batch, growth.stage_batch(plan.stage)) / 4
        gain = 1.0 if progress.step == 0 else adascale_gain(ratio, 10.0, 1.0)
        assert plan.lr == pytest.approx(min(0.5, 0.2 * fall * gain))
        assert plan.stage == 4 or progress.ledger.applied < 3900


def test_a_gain_that_rises_later_takes_the_learning_rate_to_its_limit_and_not_beyond() -> None:
    growth = Temperature(start=4, cap=64, gain=True, lr_max=0.5)
    control = controller(growth, LR(base=0.2))
    before, after = (Progress(stage=4, noise=steady(*shows)) for shows in ((1.0, 0.4), (0.0, 40.0)))
    assert control.rate(before, 64) == pytest.approx(0.2 * adascale_gain(16, 0.1, 1.0))
    assert control.rate(after, 64) == pytest.approx(0.5)


def test_what_is_measured_must_have_been_measured_in_this_stage() -> None:
    growth = Temperature(start=4, cap=256, share=1.0, lr_max=100.0)
    begin = Progress(stage_samples=10**12, stage_step=99, noise=steady(1.0, 500.0))
    control = controller(growth, LR(base=0.2))
    assert control.advance(begin).stage == 6
    for fresh in range(10):
        assert control.advance(replace(begin, noise=replace(begin.noise, fresh=fresh))).stage == 0


def test_where_the_gradient_is_lost_in_noise_no_stage_comes_after_the_last_batch() -> None:
    growth = Temperature(start=4, cap=16, share=1.0, lr_max=100.0)
    lost = Progress(stage=2, stage_samples=10**12, stage_step=99, noise=steady(-1.0, 500.0))
    assert growth.last_stage == 2
    assert controller(growth, LR(base=0.2)).advance(lost) is lost


# ── plateaus ────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(-3, 3)), min_size=3, max_size=40))
def test_the_trend_is_the_weighted_least_squares_line(updates: list[tuple[int, float]]) -> None:
    trend, edges = Trend(), np.cumsum([0, *(batch for batch, _ in updates)])
    for batch, loss in updates:
        trend = trend.add(batch, loss)
    middles, losses = (edges[1:] + edges[:-1]) / 2, [loss for _, loss in updates]
    weights = np.arange(1, len(updates) + 1) / len(updates)
    slope, _ = np.polyfit(middles, losses, 1, w=np.sqrt(weights))
    assert trend.slope == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert trend.value == pytest.approx(np.average(losses, weights=weights), abs=1e-9)
    spread = np.average((middles - np.average(middles, weights=weights)) ** 2, weights=weights)
    rest = np.average(
        (losses - np.polyval(np.polyfit(middles, losses, 1, w=np.sqrt(weights)), middles)) ** 2, weights=weights
    )
    assert trend.slope_error == pytest.approx(np.sqrt(rest / weights.sum() / spread), rel=1e-3, abs=1e-6)
    assert (trend.count, trend.samples) == (len(updates), edges[-1])


def test_the_error_of_a_slope_covers_how_slopes_scatter_and_half_as_much_more() -> None:
    random, found = np.random.default_rng(0), list[tuple[float, float]]()
    for _ in range(400):
        trend = Trend()
        for loss in random.normal(size=100).tolist():
            trend = trend.add(8, loss)
        found.append((trend.slope, trend.slope_error))
    slopes, errors = np.array(found).T
    assert slopes.std() < errors.mean() < 1.5 * slopes.std()


@pytest.mark.parametrize(("fall", "cools"), [(0.0099, True), (0.0101, False), (-0.5, True)])
def test_a_loss_that_falls_by_less_than_its_share_over_the_length_is_a_plateau(fall: float, cools: bool) -> None:
    middles = np.arange(5.0, 1000, 10)
    losses = 1 - fall / 1000 * (middles - np.average(middles, weights=np.arange(1, 101)))  # a line of mean 1
    trend = Trend()
    for loss in losses.tolist():
        trend = trend.add(10, loss)
    assert Plateau(samples=1000).reached(Noise(trend=trend), EPOCH) == cools


def test_before_its_length_and_its_updates_nothing_is_a_plateau() -> None:
    plateau = Plateau(samples=1000, updates=30)
    trend = Trend()
    for k in range(60):
        trend = trend.add(20, 1.0)
        assert plateau.reached(Noise(trend=trend), EPOCH) == (k >= 49)
    assert not Plateau(samples=1, updates=30).reached(Noise(trend=Trend().add(5, 1.0).add(5, 1.0)), EPOCH)


def drops(progress: Progress) -> int:
    """Plateaus at which the temperature has fallen."""
    return progress.policy.get("drops", 0)


def test_a_plateau_forgets_what_depends_on_the_temperature_and_keeps_the_rest() -> None:
    growth = Temperature(start=8, cap=8, plateau=Plateau(samples=200, updates=3))
    control = controller(growth, LR(base=0.3), 4000)
    run = list(walk(control, lambda progress, plan: shown(plan, loss=1.0)))
    before, after = next((one, two) for (one, _), (two, _) in pairwise(run) if drops(two) > drops(one))
    assert (after.noise.trend.count, after.noise.fresh, after.noise.product.count) == (0, 0, 0)
    assert before.noise.trend.count > 3
    assert after.stage_samples > 0


def test_at_plateaus_the_batch_grows_while_it_can_and_then_the_learning_rate_falls() -> None:
    growth = Temperature(start=8, cap=24, plateau=Plateau(samples=200, updates=3), min_stage=MinStage(updates=1))
    control = controller(growth, constant_lr(0.3).model_copy(update={"rule": None}), 4000)
    run = list(walk(control, lambda progress, plan: shown(plan, loss=1.0)))
    cooled = [progress for (before, _), (progress, _) in pairwise(run) if drops(progress) > drops(before)]
    assert [drops(progress) for progress in cooled] == list(range(1, len(cooled) + 1))
    assert len(cooled) > 8
    for progress, plan in run:
        assert plan.stage == min(drops(progress), 2)
        assert plan.lr == pytest.approx(
            0.3 / 2 ** drops(progress) * min(plan.batch, growth.stage_batch(plan.stage)) / 8
        )
    for before, after in pairwise([Progress(), *cooled]):
        assert after.ledger.applied - before.ledger.applied >= 200


def test_while_the_loss_falls_nothing_changes() -> None:
    growth = Temperature(start=8, cap=64, plateau=Plateau(samples=200))
    control = controller(growth, LR(base=0.3), 4000)
    shows = lambda progress, plan: shown(plan, loss=math.exp(-progress.samples / 5000))  # noqa: E731
    assert {(plan.batch, plan.lr) for _, plan in list(walk(control, shows))[:-1]} == {(8, 0.3)}


def test_where_the_noise_scale_keeps_the_batch_small_a_plateau_lowers_the_learning_rate() -> None:
    growth = Temperature(
        start=8,
        cap=64,
        share=1.0,
        plateau=Plateau(samples=200, updates=3),
        min_stage=MinStage(updates=2),
        confidence=0.0,
    )
    control = controller(growth, LR(base=0.3), 3000)
    run = list(walk(control, lambda progress, plan: shown(plan, 1.0, 20.0, loss=1.0)))
    assert max(plan.stage for _, plan in run) == 1  # 16 of a noise scale of 20
    last, plan = run[-2]
    assert drops(last) > 3
    assert plan.lr == pytest.approx(0.3 / 2 ** drops(last) * 2)


@pytest.mark.parametrize(
    ("growth", "lr", "told"),
    [
        (Temperature(cap=64), LR(), "the temperature never falls"),
        (Temperature(cap=64, gain=True), LR(), "the temperature never falls"),
        (Temperature(cap=64, lr_max=0.05), LR(base=0.1, decay=Cosine()), "lr_max=0.05 is below lr.base=0.1"),
        (Temperature(cap=64, plateau=Plateau(samples=9)), LR(decay=Cosine()), "give one of them"),
        (Temperature(), LR(decay=Cosine()), "set growth.cap"),
        (Temperature(cap=64), constant_lr(0.1, Cosine()), "brings its own LR rule: remove lr.rule"),
        (AdaScale(scale=4), constant_lr(0.1), "brings its own LR rule: remove lr.rule"),
        (AdaScale(scale=4), LR(decay=Cosine()), "lr.decay.kind=cosine has to be step or none"),
    ],
)
def test_what_contradicts_a_temperature_or_a_gain_is_refused(growth: Growth, lr: LR, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        controller(growth, lr)


def test_a_temperature_over_the_budget_needs_one_in_samples() -> None:
    for lr in (LR(decay=Cosine()), LR()):
        with pytest.raises(ConfigError, match=r"give budget\.epochs"):
            Controller(growth=Temperature(cap=64, lr_max=1.0), lr=lr, budget=budget(steps=100), epoch=1000)


@pytest.mark.parametrize("length", [{}, {"epochs": 1.0, "samples": 5}, {"epochs": -1.0}])
def test_a_plateau_needs_one_length(length: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Plateau(**length)
