"""Learning rate: rules by which it follows the batch, and decays along the samples. Frozen specs that are callables.

A multiplier is recomputed from scratch at every update. Decays are functions of samples, never of steps, so that they
mean the same at any batch size.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.rate_test import RateTest
from distgrow.core.spec import Fraction, PosFloat, PosInt, Spec, one_of
from distgrow.core.spec_errors import RECORDED

Base = float | Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Hold the samples axis of one run."""

    samples: int  #: applied samples that the whole budget allows
    epoch: int  #: samples of one pass over the training set


@dataclass(frozen=True, slots=True, kw_only=True)
class Grown:
    """Hold how far the batch has grown since the first stage."""

    ratio: float  #: realised batch over the first stage's, b/b₀; never above the stage's own
    steps: float  #: growth steps taken, fractional if the cap cut the last one short


class Constant(Spec):
    """η does not follow the batch."""

    kind: Literal["constant"] = "constant"

    def __call__(self, grown: Grown) -> float:
        return 1.0

    def factor_for(self, growth: float) -> float:
        """Return γ for a batch that grows by δ = `growth`."""
        return 1.0


class Power(Spec):
    """η ∝ b^power."""

    kind: Literal["power"] = "power"
    power: Annotated[float, Field(ge=-2, le=2)] = 0.5
    """Exponent p of η = η₀·(b/b₀)^p."""

    def __call__(self, grown: Grown) -> float:
        return grown.ratio**self.power

    def factor_for(self, growth: float) -> float:
        """Return γ for a batch that grows by δ = `growth`."""
        return growth**self.power


class Sqrt(Spec):
    """η ∝ √b: the paper's guideline, δ ≈ γ²."""

    kind: Literal["sqrt"] = "sqrt"

    def __call__(self, grown: Grown) -> float:
        return math.sqrt(grown.ratio)

    def factor_for(self, growth: float) -> float:
        """Return γ for a batch that grows by δ = `growth`."""
        return math.sqrt(growth)


class Linear(Spec):
    """η ∝ b (Goyal et al. 2017)."""

    kind: Literal["linear"] = "linear"

    def __call__(self, grown: Grown) -> float:
        return grown.ratio

    def factor_for(self, growth: float) -> float:
        """Return γ for a batch that grows by δ = `growth`."""
        return growth


class Factor(Spec):
    """η = η₀·γ^m at stage m, frozen at the cap (Umeda & Iiduka 2025)."""

    kind: Literal["factor"] = "factor"
    factor: PosFloat = 1.4
    """γ, the learning rate's factor at each growth step."""

    def __call__(self, grown: Grown) -> float:
        return self.factor**grown.steps

    def factor_for(self, growth: float) -> float:
        """Return γ for a batch that grows by δ = `growth`."""
        return self.factor


Rule = Annotated[Constant | Sqrt | Linear | Power | Factor, Field(discriminator="kind")]


class NoDecay(Spec):
    """The learning rate does not decay."""

    kind: Literal["none"] = "none"

    def warm(self, samples: int, batch: int, span: Span) -> float:
        """Return the warm-up multiplier of an update of `batch` samples that begins after `samples` applied ones."""
        return 1.0

    def fall(self, samples: int, span: Span) -> float:
        """Return the decay multiplier after `samples` applied samples. It never rises."""
        return 1.0


class DecayEvery(Spec):
    """The spacing of step decay, on the samples axis."""

    epochs: PosFloat | None = None
    """Epochs between two decays."""
    samples: PosInt | None = None
    """Samples between two decays."""

    @model_validator(mode="after")
    def _one_unit(self) -> "DecayEvery":
        one_of(self, "epochs", "samples")
        return self


class StepDecay(Spec):
    """η is multiplied by `factor` every so many epochs or samples."""

    kind: Literal["step"] = "step"
    every: DecayEvery = DecayEvery(epochs=10)
    """Spacing of the decays: {epochs: …} or {samples: …}."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What the learning rate is multiplied by at each decay."""

    def warm(self, samples: int, batch: int, span: Span) -> float:
        """Return 1: there is no warm-up."""
        return 1.0

    def fall(self, samples: int, span: Span) -> float:
        """Return factor^⌊samples / every⌋."""
        every = self.every.samples or (self.every.epochs or 0) * span.epoch
        return self.factor ** math.floor(samples / every * (1 + 1e-12))


class Cosine(Spec):
    """η falls along half a cosine from 1 to `final` over the budget, after a linear warm-up."""

    kind: Literal["cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the budget over which the learning rate rises from 0."""
    final: Fraction = 0.0
    """Multiplier at the end of the budget."""

    def warm(self, samples: int, batch: int, span: Span) -> float:
        """Return the linear rise over the first `warmup` of the budget."""
        return _rise(samples + batch, self.warmup * span.samples)

    def fall(self, samples: int, span: Span) -> float:
        """Return final + (1 − final)(1 + cos πx)/2, with x the fraction of the budget after the warm-up."""
        x = _through(samples, self.warmup * span.samples, span.samples)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * x)) / 2


class WSD(Spec):
    """Warm-up, stable, decay: linear rise, constant, linear fall to `final` over the last part of the budget."""

    kind: Literal["wsd"] = "wsd"
    warmup: Fraction = 0.0
    """Fraction of the budget over which the learning rate rises from 0."""
    decay: Fraction = 0.2
    """Fraction of the budget, its last, over which the learning rate falls."""
    final: Fraction = 0.0
    """Multiplier at the end of the budget."""

    @model_validator(mode="after")
    def _fits(self) -> "WSD":
        if self.warmup + self.decay > 1:
            raise ConfigError(f"warmup={self.warmup} and decay={self.decay} overlap: together at most 1")
        return self

    def warm(self, samples: int, batch: int, span: Span) -> float:
        """Return the linear rise over the first `warmup` of the budget."""
        return _rise(samples + batch, self.warmup * span.samples)

    def fall(self, samples: int, span: Span) -> float:
        """Return 1 until the last `decay` of the budget, then a line down to `final`."""
        x = _through(samples, (1 - self.decay) * span.samples, span.samples)
        return 1 - (1 - self.final) * x


Decay = Annotated[NoDecay | StepDecay | Cosine | WSD, Field(discriminator="kind")]


def _rise(samples: float, over: float) -> float:
    return min(1.0, samples / over) if over > 0 else 1.0


def _through(samples: float, first: float, last: float) -> float:
    """Return how far `samples` is between first and last, within 0 … 1."""
    return min(1.0, max(0.0, (samples - first) / (last - first))) if last > first else 0.0


class LR(Spec):
    """The learning rate: base × rule(batch) × decay(samples)."""

    base: PosFloat | Literal["auto"] = 0.1
    """η₀, the learning rate of the first stage; `auto`: it is measured before the first update, as `test` says."""
    test: RateTest | None = None
    """How `auto` is measured. Default: the defaults of these keys."""
    measured: Annotated[PosFloat | None, RECORDED] = None
    """What `auto` has been measured as. A run writes it into its own config.yaml; a resume does not measure again."""
    rule: Rule | None = None
    """How η follows the batch. Default: sqrt (linear for the optimizer clars), but constant for auto, late,
    progress_test, critical_batch, noise_scale, cabs and tau_adaptive, and γ = 1.4 for norm_threshold. Growth that
    replaces a decay (seesaw, increase) or sets the temperature (temperature, matched) brings its own."""
    decay: Decay = NoDecay()
    """How η falls along the samples axis."""

    @model_validator(mode="after")
    def _measures_what_is_auto(self) -> "LR":
        for key in ("test", "measured"):
            if self.base != "auto" and getattr(self, key) is not None:
                raise ConfigError(f"lr.{key} is for lr.base=auto, and lr.base={self.base:g}: leave out one of the two")
        return self

    @property
    def unknown(self) -> bool:
        """Return whether η₀ is still to be measured."""
        return self.base == "auto" and self.measured is None

    @property
    def initial(self) -> float:
        """Return η₀.

        Raises:
            ConfigError: It is still to be measured.
        """
        base = self.measured if self.base == "auto" else self.base
        if base is None:
            raise ConfigError(
                "lr.base=auto is not measured yet, which 'distgrow train' and fit() do before the first update: give "
                "lr.base a number here, such as what 'distgrow range-test' proposes"
            )
        return base

    def at(self, rate: float) -> "LR":
        """Return the same with η₀ = `rate`; of one that is `auto`, with that as what was measured."""
        return self.model_copy(update={"measured" if self.base == "auto" else "base": rate})

    def starting(self, rate: float) -> "LR":
        """Return the same whose short runs begin at `rate`, if it is to be measured and says no other."""
        test = self.test or RateTest()
        if not self.unknown or test.start is not None:
            return self
        return self.model_copy(update={"test": test.model_copy(update={"start": rate})})


def constant_lr(base: Base, decay: Decay | None = None) -> LR:
    """Return η₀, whatever the batch."""
    return LR(base=base, rule=Constant(), decay=decay or NoDecay())


def sqrt_lr(base: Base, decay: Decay | None = None) -> LR:
    """Return η₀·√(b/b₀)."""
    return LR(base=base, rule=Sqrt(), decay=decay or NoDecay())


def linear_lr(base: Base, decay: Decay | None = None) -> LR:
    """Return η₀·b/b₀."""
    return LR(base=base, rule=Linear(), decay=decay or NoDecay())


def power_lr(base: Base, power: float, decay: Decay | None = None) -> LR:
    """Return η₀·(b/b₀)^power."""
    return LR(base=base, rule=Power(power=power), decay=decay or NoDecay())


def factor_lr(base: Base, factor: float, decay: Decay | None = None) -> LR:
    """Return η₀·γ^m at stage m."""
    return LR(base=base, rule=Factor(factor=factor), decay=decay or NoDecay())
