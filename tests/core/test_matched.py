"""Matched growth walks the temperature along a line whatever the decay, as closed forms and brute force say."""

import math
from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow import auto, budget, matched
from distgrow.config.load import parse
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, WSD, Cosine, Decay, DecayEvery, NoDecay, Span, Sqrt, StepDecay
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.core.stages import Stages, every
from distgrow.growth.base import check_settings
from distgrow.growth.controller import Controller
from distgrow.growth.matched import Matched
from distgrow.growth.no_growth import no_growth
from distgrow.theory import last_iterate

TOTAL = 4_000_000
FINE = matched(16, 10**6, 1.01)  # a ladder fine enough for a continuum


def controller(growth: Matched, decay: Decay | None = None, total: int = TOTAL) -> Controller:
    lr = LR(base=0.5, decay=decay or NoDecay())
    return Controller(growth=growth, lr=lr, budget=budget(samples=total), epoch=10**9, max_micro=10**9)


def walk(control: Controller) -> Iterator[tuple[float, Plan]]:
    """Every update, and the share of the budget that was spent before it."""
    progress = Progress()
    total = control.samples()
    while not control.done(progress):
        progress = control.advance(progress)
        plan = control.plan(progress)
        yield progress.ledger.applied / total, plan
        progress = control.after(progress, plan, Outcome())


def plans_at(control: Controller, shares: list[float]) -> list[Plan]:
    """The plans of the updates at these shares of the budget, by the forecast alone."""
    ends = list(accumulate((stride.plan.batch * stride.updates for stride in control.forecast()), initial=0))
    strides = list(control.forecast())
    found: list[Plan] = []
    for share in shares:
        sample = share * TOTAL
        k = next(k for k in range(len(strides)) if ends[k + 1] > sample)
        before = strides[k].begin.repeat(strides[k].plan.batch, int(sample - ends[k]) // strides[k].plan.batch)
        found.append(control.plan(before))
    return found


def steps(control: Controller) -> int:
    return sum(updates for _, _, updates in control.outline(Progress()))


# ── closed forms ────────────────────────────────────────────────────────────────────────────────────────────────


def test_under_constant_eta_the_batch_is_one_over_what_is_left() -> None:
    shares = [0.1, 0.25, 0.5, 0.75, 0.9, 0.97]
    for share, plan in zip(shares, plans_at(controller(FINE), shares), strict=True):
        assert plan.batch / 16 == pytest.approx(1 / (1 - share), rel=0.02 + 1 / plan.batch)  # half a rung, rounded up
        assert plan.lr == 0.5


def test_a_decay_over_the_last_fifth_of_the_updates_lets_the_batch_grow_to_three_times() -> None:
    share = last_iterate.decay_in_samples(0.2)
    assert share == pytest.approx(1 / 3)
    control = controller(matched(160, 10**6, 1.01), WSD(decay=share))
    plans = plans_at(control, [0.25, 0.5, 0.75, 0.9, 0.97])
    for wanted, plan in zip([4 / 3, 2, 3, 3, 3], plans, strict=True):
        assert plan.batch / 160 == pytest.approx(wanted, rel=0.015)
    rates = [plan.lr for _, plan in walk(control)]
    held = sum(rate == 0.5 for rate in rates) / len(rates)
    assert held == pytest.approx(0.8, abs=0.003)  # of the updates


@pytest.mark.parametrize("factor", [1.05, 1.5, 2.0])
def test_a_linear_decay_leaves_the_batch_as_it_is(factor: float) -> None:
    control = controller(matched(16, 4096, factor), WSD(decay=1))
    assert {batch for _, batch, _ in control.outline(Progress())} <= {16, *range(17, 32)}  # the last takes what is left
    assert steps(control) == TOTAL // 16
    assert "nothing is left for the batch" in (no_growth(control) or "")


@pytest.mark.parametrize(("most", "wanted"), [(1, 1.0), (2, 0.625), (3, 0.556), (4, 0.531), (8, 0.508), (10**4, 0.5)])
def test_the_cap_decides_the_steps(most: int, wanted: float) -> None:
    control = controller(matched(400, 400 * most, 1.01))
    assert steps(control) / (TOTAL / 400) == pytest.approx(wanted, abs=0.002)
    assert last_iterate.matched_steps(most) == pytest.approx(wanted, abs=0.0005)


@given(st.integers(2, 8), st.sampled_from([1.25, 1.5, 2.0]), st.floats(0, 0.7))
def test_at_the_cap_the_rate_falls_along_the_line(most: int, factor: float, hold: float) -> None:
    control = controller(matched(32, 32 * most, factor, hold), total=100_000)
    for share, plan in list(walk(control))[:-1]:
        line = min(1.0, (1 - share) / (1 - hold))
        assert plan.lr == pytest.approx(0.5 * min(1.0, most * line))


# ── auto is its case of constant η ──────────────────────────────────────────────────────────────────────────────


@given(
    st.sampled_from([1.5, 2.0, 3.0, 2**0.5]), st.floats(0.01, 0.9), st.integers(10**5, 10**9), st.integers(1, 12)
)  # fmt: skip
def test_autos_line_is_that_of_constant_eta_to_the_sample(factor: float, hold: float, total: int, depth: int) -> None:
    span = Span(samples=total, epoch=10**9)
    cap = math.ceil(16 * factor**depth)
    ours = Matched(start=16, cap=cap, factor=factor, hold=hold)
    theirs = auto(16, cap, factor=factor, hold=hold, early=0.01, depth=depth)
    one, other = ours.trigger(Stages(), LR(), span), theirs.trigger(Stages(), LR(), span)
    for m in range(int(ours.last_stage) - (ours.growth_steps(10**6) % 1 > 0)):
        assert min(one.end(m), total) == min(other.end(m), total)  # at the end or never is the same


@given(st.sampled_from([1.5, 2.0, 3.0]), st.floats(0.01, 0.9), st.integers(0, 99))
def test_autos_places_are_what_they_were_to_the_bit(factor: float, hold: float, stage: int) -> None:
    before = hold + (1 - hold) * (1 - factor ** -(stage + 0.5))
    assert auto(factor=factor, hold=hold, early=0.01).due(stage) == before


# ── any decay, by trying every sample ───────────────────────────────────────────────────────────────────────────

warmups = st.sampled_from([0.0, 0.05, 0.3])
decays = st.one_of(
    st.just(NoDecay()),
    st.builds(StepDecay, every=st.builds(DecayEvery, samples=st.integers(40, 3000)), factor=st.floats(0.3, 0.95)),
    st.builds(Cosine, warmup=warmups, final=st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    st.builds(WSD, warmup=warmups, decay=st.floats(0.01, 0.7), final=st.sampled_from([0.0, 0.1, 0.5])),
)


@settings(max_examples=150, deadline=None)
@given(
    decays, st.sampled_from([1.1, 1.5, 2.0]), st.sampled_from([0.0, 0.2]), st.integers(8, 600), st.integers(50, 4000)
)
def test_a_stage_ends_where_the_ratio_of_decay_and_line_is_first_half_way(
    decay: Decay, factor: float, hold: float, cap: int, total: int
) -> None:
    growth = Matched(start=8, cap=cap, factor=factor, hold=hold)
    lr, span = LR(decay=decay), Span(samples=total, epoch=10**6)
    trigger = growth.trigger(Stages(), lr, span)
    begin = max(hold, getattr(decay, "warmup", 0.0))
    ratios = [decay.fall(s, span) / min(1.0, (1 - s / total) / (1 - begin)) for s in range(total)]
    for stage in range(int(growth.last_stage)):
        steps = (growth.growth_steps(stage) + growth.growth_steps(stage + 1)) / 2
        first = next((s for s, ratio in enumerate(ratios) if ratio >= factor**steps * (1 - 1e-9)), math.inf)
        later = next((s for s, ratio in enumerate(ratios) if ratio >= factor**steps * (1 + 1e-9)), math.inf)
        assert first <= trigger.end(stage) <= later


@settings(max_examples=40, deadline=None)
@given(decays, st.sampled_from([1.1, 2.0]), st.integers(10**5, 10**7), st.randoms(use_true_random=False))
def test_in_long_runs_no_place_is_missed_by_more_than_it_promises(
    decay: Decay, factor: float, total: int, random: object
) -> None:
    growth = Matched(start=8, cap=512, factor=factor)
    span, lr = Span(samples=total, epoch=10**9), LR(decay=decay)
    trigger, begin = growth.trigger(Stages(), lr, span), getattr(decay, "warmup", 0.0)

    def ratio(s: int) -> float:
        return decay.fall(s, span) / min(1.0, (1 - s / total) / (1 - begin))

    places = [*range(0, total, max(1, total // 20_000))]
    highest = list(accumulate(map(ratio, places), max))
    for stage in range(int(growth.last_stage)):
        level = factor ** ((growth.growth_steps(stage) + growth.growth_steps(stage + 1)) / 2)
        seen = next((s for s, high in zip(places, highest, strict=True) if high >= level * (1 + 1e-9)), math.inf)
        end = trigger.end(stage)
        if end < math.inf:  # there the ratio is high enough
            assert ratio(int(end)) >= level * (1 - 1e-9)
        if seen < math.inf and not isinstance(decay, StepDecay):  # and it was nowhere before
            assert end <= seen + (total - seen) / 4096 + 1


@settings(max_examples=60, deadline=None)
@given(decays, st.sampled_from([1.25, 2.0]), st.integers(16, 400), st.integers(2000, 20_000))
def test_the_rate_is_the_decays_and_the_batch_never_falls(decay: Decay, factor: float, cap: int, total: int) -> None:
    growth = Matched(start=16, cap=cap, factor=factor)
    control = controller(growth, decay, total)
    updates = list(walk(control))
    batches = [plan.batch for _, plan in updates]
    assert batches[:-1] == sorted(batches[:-1])
    assert sum(batches) == total
    assert max(batches[:-1], default=16) <= cap
    span = Span(samples=total, epoch=10**9)
    for share, plan in updates:
        samples = round(share * total)
        shape = decay.warm(samples, plan.batch, span) * decay.fall(samples, span)
        assert plan.lr <= 0.5 * shape * (1 + 1e-12)
        begin = getattr(decay, "warmup", 0.0)
        if decay.fall(samples, span) <= cap / 16 * min(1.0, (1 - share) / (1 - begin)):
            assert plan.lr == pytest.approx(0.5 * shape)


@pytest.mark.parametrize("decay", [NoDecay(), WSD(decay=0.2), WSD(decay=0.7), Cosine(final=0.6)])
def test_the_batches_are_those_of_least_noise_at_their_rates(decay: Decay) -> None:
    updates = [plan for _, plan in walk(controller(matched(32, 10**5, 1.01), decay, 1_000_000))]
    rates = np.array([plan.lr for plan in updates])
    batches = np.array([plan.batch for plan in updates], float)
    if isinstance(decay, Cosine):  # while its ratio to the line rises
        assert rates[-1] > 0
    best = last_iterate.best_batches(rates, float(batches.sum()))
    ratio = last_iterate.noise_term(1.0, rates, batches) / last_iterate.noise_term(1.0, rates, best)
    assert 1 <= ratio < 1.02


# ── what it cannot be ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("start", "total", "epoch"), [(16, 10**6, 10**6), (7, 12345, 10**4), (3, 50, 10**5)])
def test_without_a_cap_the_last_batch_is_about_the_root_of_what_is_to_do(start: int, total: int, epoch: int) -> None:
    growth = Matched(start=start).for_run(Span(samples=total, epoch=epoch))
    assert growth.cap == max(start, min(epoch // 4, int(math.sqrt(start * total))))
    control = Controller(growth=growth, budget=budget(samples=total), epoch=epoch, max_micro=10**9)
    control.check()
    assert max(plan.batch for _, plan in walk(control)) < (growth.cap or 0) + start


def test_a_cap_or_more_data_changes_nothing_of_a_cap_that_was_given() -> None:
    growth = Matched(start=4, cap=64)
    assert growth.for_run(Span(samples=100, epoch=10)) is growth


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"budget": {"steps": 100}}, "budget.steps has no end"),
        ({"stages": {"every": {"epochs": 1}}}, "remove stages"),
        ({"lr": {"base": 0.1, "rule": {"kind": "sqrt"}}}, "remove lr.rule"),
        ({"growth": {"kind": "matched", "start": 64, "cap": 32}}, "start=64 is above cap=32"),
        ({"growth": {"kind": "matched", "hold": 1.0}}, "growth.hold=1.0"),
        ({"growth": {"kind": "matched", "factor": 1.0}}, "growth.factor=1.0"),
        ({"lr": {"decay": {"kind": "wsd", "warmup": 1.0, "decay": 0.0}}}, "lower lr.decay.warmup"),
        ({"growth": {"kind": "matched", "cap": 10**6}}, "of the training set"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, object], told: str) -> None:
    config = {"growth": {"kind": "matched"}, "budget": {"epochs": 40000}, **changed}
    with pytest.raises(ConfigError) as refused:
        parse(config).controller().check()
    assert told in str(refused.value)


def test_it_needs_a_cap_if_nobody_knows_the_run() -> None:
    with pytest.raises(ConfigError, match=r"set growth\.cap"):
        Matched().trigger(Stages(), LR(), Span(samples=100, epoch=100))
    with pytest.raises(ConfigError, match=r"remove stages"):
        check_settings(Matched(), every(samples=10), LR(), Span(samples=100, epoch=100))
    with pytest.raises(ConfigError, match=r"remove lr\.rule"):
        check_settings(Matched(), Stages(), LR(rule=Sqrt()), Span(samples=100, epoch=100))


# ── the theory, by brute force ──────────────────────────────────────────────────────────────────────────────────

rates = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=30)


@given(rates, st.integers(0, 1000))
def test_no_other_batches_of_the_same_sum_have_less_noise(etas: list[float], seed: int) -> None:
    best = last_iterate.best_batches(etas, 1000.0)
    least = last_iterate.noise_term(1.0, etas, best)
    assert best.sum() == pytest.approx(1000.0)
    moved = best * np.random.default_rng(seed).uniform(0.5, 1.5, len(best))
    moved *= 1000.0 / moved.sum()
    assert last_iterate.noise_term(1.0, etas, moved) >= least * (1 - 1e-12)
    assert least <= 2 * sum(etas) / 1000.0 * (1 + 1e-12)  # 2σ²A/N, whatever the shape


def test_the_noise_of_known_shapes() -> None:
    count = 20_000
    t = np.arange(count) / count
    shapes = {
        "constant": (np.ones(count), 10.5),
        "wsd": (np.minimum(1, (1 - t) / 0.2), 4.66),
        "cosine": ((1 + np.cos(np.pi * t)) / 2, 4.24),
        "linear": (1 - t, 4.0),
    }
    for name, (shape, wanted) in shapes.items():
        area = shape.sum()
        alike = last_iterate.noise_term(1.0, shape, np.ones(count)) / (area / count / 2)
        best = last_iterate.noise_term(1.0, shape, last_iterate.best_batches(shape, count)) / (area / count / 2)
        assert alike == pytest.approx(wanted, rel=0.02), name
        assert best == pytest.approx(4, rel=0.02), name


@pytest.mark.slow
@given(rates, st.floats(0.1, 3.0))
@settings(max_examples=5, deadline=None)
def test_no_quadratic_ends_above_the_bound(etas: list[float], variance: float) -> None:
    rng, batches = np.random.default_rng(0), np.arange(1, len(etas) + 1, dtype=float)
    for curvature in (0.01, 0.3, 1.0):
        theta = np.ones(20_000)
        for lr, batch in zip(etas, batches, strict=True):
            theta -= lr * (curvature * theta + rng.normal(0, math.sqrt(variance / batch), theta.shape))
        ended = curvature / 2 * np.mean(theta**2)
        assert ended <= last_iterate.loss_bound(1.0, variance, etas, batches) * 1.05


@given(st.floats(0.05, 1.0))
def test_the_share_of_samples_of_a_decay_by_counting_updates(decay: float) -> None:
    count = 100_000
    t = (np.arange(count) + 0.5) / count
    shape = np.minimum(1, (1 - t) / decay)
    batches = last_iterate.best_batches(shape, 1.0)
    assert batches[t > 1 - decay].sum() == pytest.approx(last_iterate.decay_in_samples(decay), abs=0.01)


@pytest.mark.parametrize("wrong", [0.5, 0.0, math.nan])
def test_what_is_no_growth_or_no_decay_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=str(wrong)):
        last_iterate.matched_steps(wrong)
    with pytest.raises(ValueError, match="share of the updates"):
        last_iterate.decay_in_samples(wrong - 1)
    with pytest.raises(ValueError, match="above 0"):
        last_iterate.best_batches([1.0, wrong - 1], 1.0)
