"""The learning rate is base × rule × decay, each its closed form, frozen at the cap, on the samples axis."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrow import (
    budget,
    constant,
    constant_lr,
    every,
    exponential,
    factor_lr,
    increase,
    linear,
    linear_lr,
    power_lr,
    seesaw,
    sqrt_lr,
)
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, WSD, Cosine, Decay, DecayEvery, NoDecay, Span, StepDecay
from distgrow.core.progress import Ledger, Progress
from distgrow.core.stages import Stages
from distgrow.growth import Growth
from distgrow.growth.controller import Controller

SPAN = Span(samples=10_000, epoch=500)
RULES: dict[str, tuple[Callable[[float], LR], Callable[[float], float]]] = {
    "constant": (constant_lr, lambda ratio: 1.0),
    "sqrt": (sqrt_lr, math.sqrt),
    "linear": (linear_lr, lambda ratio: ratio),
    "power": (lambda base: power_lr(base, 0.3), lambda ratio: ratio**0.3),
}
DECAYS: list[Decay] = [
    StepDecay(every=DecayEvery(samples=900), factor=0.3),
    StepDecay(every=DecayEvery(epochs=2), factor=0.5),
    Cosine(),
    Cosine(warmup=0.1, final=0.05),
    WSD(warmup=0.05, decay=0.3, final=0.1),
    WSD(warmup=0.0, decay=1.0),
    WSD(warmup=1.0, decay=0.0),
]


def at(samples: int, stage: int = 0, step: int = 0) -> Progress:
    """Progress after so many applied samples."""
    return Progress(samples=samples, stage=stage, step=step, ledger=Ledger(applied=samples))


def rates(growth: Growth, lr: LR, samples: int = 10_000) -> list[tuple[int, int, int, float]]:
    """(samples before, stage, batch, learning rate) of every update."""
    stages = Stages() if growth.sets_stages else every(samples=1500)
    control = Controller(growth=growth, stages=stages, lr=lr, budget=budget(samples=samples), epoch=500, max_micro=4096)
    progress, found = Progress(), []
    while not control.done(progress):
        progress = control.advance(progress)
        plan = control.plan(progress)
        found.append((progress.samples, plan.stage, plan.batch, plan.lr))
        progress = progress.repeat(plan.batch, 1)
    return found


# ── rules ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("growth", [exponential(16, 2, 256), exponential(10, 1.3), linear(16, 24, 100), constant(32)])
def test_the_learning_rate_follows_the_realised_batch(rule: str, growth: Growth) -> None:
    build, closed_form = RULES[rule]
    for _, _, batch, rate in rates(growth, build(0.2))[:-1]:
        assert rate == pytest.approx(0.2 * closed_form(batch / growth.start), rel=1e-12)


@given(st.floats(1.05, 3), st.integers(0, 12))
def test_an_explicit_factor_multiplies_at_every_growth_step(gamma: float, stage: int) -> None:
    control = Controller(growth=exponential(8, 1.5), lr=factor_lr(0.1, gamma), budget=budget(samples=1), epoch=1)
    assert control.rate(at(0, stage), 8) == pytest.approx(0.1 * gamma**stage, rel=1e-12)


@pytest.mark.parametrize("lr", [*(build(0.2) for build, _ in RULES.values()), factor_lr(0.2, 1.4)])
@pytest.mark.parametrize("growth", [exponential(16, 2, 100), exponential(1, 1.05, 2), linear(16, 50, 100)])
def test_the_learning_rate_is_frozen_at_the_cap(growth: Growth, lr: LR) -> None:
    capped = {
        rate for _, _, batch, rate in rates(growth, lr, samples=40_000)[:-1] if batch == growth.stage_batch(10**4)
    }
    assert len(capped) == 1


def test_a_factor_reaches_the_cap_with_the_part_of_a_growth_step_that_is_left() -> None:
    *_, (_, _, batch, rate) = rates(exponential(16, 2, 90), factor_lr(0.1, 2.0))[:-1]
    assert batch == 90
    assert rate == pytest.approx(0.1 * 90 / 16)  # δ = γ: exactly linear scaling, up to the cap


def test_a_shortened_last_update_takes_the_learning_rate_of_its_own_batch() -> None:
    *_, (_, _, batch, rate) = rates(constant(64), linear_lr(0.1), samples=64 * 3 + 100)
    assert batch == 100  # 36 left over would be too few alone
    assert rate == pytest.approx(0.1)  # never above the stage's own


# ── decays ──────────────────────────────────────────────────────────────────────────────────────────────────────


def by_hand(decay: Decay, samples: int) -> float:
    """The decay's formula, written again."""
    total, x = SPAN.samples, samples / SPAN.samples
    match decay:
        case StepDecay():
            return decay.factor ** (samples // (decay.every.samples or int((decay.every.epochs or 0) * SPAN.epoch)))
        case Cosine():
            x = max(0.0, (samples - decay.warmup * total) / (total - decay.warmup * total))
            return decay.final + (1 - decay.final) * 0.5 * (1 + math.cos(math.pi * x))
        case WSD():
            return 1.0 if x <= 1 - decay.decay else 1 - (1 - decay.final) * (1 - (1 - x) / decay.decay)
        case NoDecay():
            return 1.0


@pytest.mark.parametrize("decay", DECAYS)
@given(st.integers(0, 10_000))
def test_decays_are_their_formulas_on_the_samples_axis(decay: Decay, samples: int) -> None:
    assert decay.fall(samples, SPAN) == pytest.approx(by_hand(decay, samples), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_decays_never_rise_and_end_where_they_say(decay: Decay) -> None:
    values = [decay.fall(samples, SPAN) for samples in range(0, 10_001, 10)]
    assert values[0] == 1.0
    assert all(before >= after for before, after in pairwise(values))
    if isinstance(decay, Cosine | WSD) and not (isinstance(decay, WSD) and decay.decay == 0):
        assert values[-1] == pytest.approx(decay.final, abs=1e-12)


@pytest.mark.parametrize("decay", [Cosine(warmup=0.1), WSD(warmup=0.1)])
def test_warm_up_rises_linearly_and_ends_at_its_share_of_the_budget(decay: Cosine | WSD) -> None:
    assert decay.warm(0, 10, SPAN) == pytest.approx(10 / 1000)
    assert decay.warm(490, 10, SPAN) == pytest.approx(0.5)
    assert decay.warm(990, 10, SPAN) == decay.warm(5000, 10, SPAN) == 1.0
    assert decay.fall(1000, SPAN) == 1.0


@pytest.mark.parametrize("decay", [d for d in DECAYS if d.warm(0, 16, SPAN) == 1.0])
@given(st.integers(0, 9_999), st.integers(0, 5))
def test_every_decay_composes_with_every_growth_and_rule(decay: Decay, samples: int, stage: int) -> None:
    for growth in (exponential(16, 2, 256), linear(16, 16), constant(16)):
        plain = Controller(growth=growth, lr=sqrt_lr(0.3), budget=budget(samples=10_000), epoch=500)
        decayed = replace(plain, lr=sqrt_lr(0.3, decay))
        batch = growth.stage_batch(stage)
        wanted = plain.rate(at(samples, stage), batch) * by_hand(decay, samples)
        assert decayed.rate(at(samples, stage), batch) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_decay_ignores_how_many_steps_it_took() -> None:
    control = Controller(growth=constant(16), lr=LR(decay=Cosine()), budget=budget(samples=10_000), epoch=500)
    assert control.rate(at(3000, step=3), 16) == control.rate(at(3000, step=3000), 16)


def test_with_a_budget_in_steps_decay_ends_with_the_last_sample_of_the_run() -> None:
    control = Controller(
        growth=exponential(16, 2, 64), stages=every(steps=10), lr=LR(decay=WSD(decay=0.5)), budget=budget(steps=40),
        epoch=500,
    )  # fmt: skip
    total = 10 * (16 + 32 + 64 + 64)
    assert control.samples() == total
    assert control.rate(at(total // 2), 16) == pytest.approx(0.1)
    assert control.rate(at(total * 3 // 4), 16) == pytest.approx(0.05)


# ── growth in place of decay ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("growth", "power"), [(seesaw(16, 2.0, 10**6), 0.5), (increase(16, 2.0, 10**6), 1.0)])
def test_growth_takes_its_share_of_every_decay(growth: Growth, power: float) -> None:
    for samples, stage, batch, rate in rates(growth, LR(base=0.4, decay=DECAYS[1]))[:-1]:
        assert stage == samples // 1000
        assert batch == 16 * 2**stage
        assert rate == pytest.approx(0.4 * 2.0 ** (stage * (power - 1)))


@pytest.mark.parametrize("growth", [seesaw(16, 2.0, 64), increase(16, 2.0, 64)])
def test_beyond_the_cap_the_learning_rate_decays_instead(growth: Growth) -> None:
    found = rates(growth, LR(base=0.4, decay=DECAYS[1]))[:-1]
    capped = [(stage, rate) for _, stage, batch, rate in found if batch == 64]
    for stage, rate in capped:
        assert rate == pytest.approx(capped[0][1] * 2.0 ** (capped[0][0] - stage))
    assert capped[-1][0] == 9


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: constant_lr(0.0), "base"),
        (lambda: constant_lr(-0.1), "base"),
        (lambda: constant_lr(math.nan), "base"),
        (lambda: constant_lr(math.inf), "base"),
        (lambda: factor_lr(0.1, 0.0), "factor"),
        (lambda: DecayEvery(epochs=1, samples=1), "exactly one of epochs, samples"),
        (lambda: StepDecay(factor=1.0), "factor"),
        (lambda: WSD(warmup=0.6, decay=0.6), "overlap: together at most 1"),
        (lambda: Cosine(warmup=1.0), "warmup"),
    ],
)
def test_learning_rates_that_cannot_be_are_refused_with_their_key(build: Callable[[], object], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build()
    assert told in str(refused.value)
