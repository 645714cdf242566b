"""Growth whose stages follow from the budget or from the learning rate's decay, and the union of all growth."""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.core.lr import LR, NoDecay, Rule, Span
from distgrow.core.lr import Constant as ConstantRule
from distgrow.core.progress import Progress
from distgrow.core.spec import ConfigError, PosFloat, at_least
from distgrow.core.stages import Following, Geometric, Listed, Stages, Trigger
from distgrow.growth.adaptive import NormThreshold, ProgressTest
from distgrow.growth.auto import Auto
from distgrow.growth.base import Constant, Exponential, Geometrical, Ladder, Linear, Steps, needs_samples
from distgrow.growth.temperature import AdaScale, Temperature
from distgrow.growth.tracking import CABS, NoiseScale, Tracking
from distgrow.theory.finite_sum import FiniteSum
from distgrow.theory.sgd import optimal_sample_ratio


class Optimal(Geometrical):
    """Exponential growth whose stage lengths are optimal for δ, γ (of lr.rule) and the budget: samples ∝ (δ/γ)^2m."""

    kind: Literal["optimal"] = "optimal"
    sets_stages: ClassVar[bool] = True

    def boundaries(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        self.needs_cap("cuts the budget into the stages up to the cap")
        needs_samples("growth.kind=optimal", span)
        count, ratio = int(self.top) + 1, optimal_sample_ratio(self.factor, self.rule(lr).factor_for(self.factor))
        first = span.samples / math.fsum(ratio**m for m in range(count))
        shortest = first * min(1.0, ratio ** (count - 1))
        if shortest < 1:
            raise ConfigError(
                f"growth.kind=optimal: the shortest of {count} stages would have {shortest:.3g} samples; "
                "raise budget, lower growth.cap or bring lr.rule closer to sqrt"
            )
        return Geometric(axis="samples", first=first, ratio=ratio)


class Late(Geometrical):
    """b₀ for most of a known budget, then growth to the cap in equal stages: warm-up–stable–decay, growth for decay.

    After arXiv 2602.14208, whose decay phase of the learning rate it replaces. η is constant unless lr.rule says else.
    """

    kind: Literal["late"] = "late"
    sets_stages: ClassVar[bool] = True
    default_rule: ClassVar[Rule] = ConstantRule()
    hold: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Fraction of the budget that b₀ is held for."""

    def boundaries(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        self.needs_cap("grows to the cap by the end of the budget")
        needs_samples("growth.kind=late", span)
        count, rest = int(self.top), (1 - self.hold) * span.samples
        if rest < count:
            raise ConfigError(
                f"growth.kind=late: {count} stages in the last {rest:.3g} samples of the budget would have less than "
                "one each; raise budget, or lower growth.hold or growth.cap"
            )
        first = self.hold * span.samples
        return Listed(axis="samples", ends=tuple(at_least(first + rest * m / count) for m in range(count)))


class Replacing(Geometrical):
    """Growth in place of the LR's decay: wherever the decay has fallen by another δ, the batch grows by δ."""

    sets_stages: ClassVar[bool] = True
    brings_rule: ClassVar[bool] = True
    power: ClassVar[float]

    @property
    def top(self) -> float:
        return math.inf

    def boundaries(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        if isinstance(lr.decay, NoDecay):
            raise ConfigError(f"{self.name} growth replaces a decay: set lr.decay to step, cosine or wsd")
        needs_samples(f"growth.kind={self.name}", span)
        return Following(decay=lr.decay, span=span, level=lambda stage: self.factor ** -(stage + 1))

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        """δ^−m·(b/b₀)^power: what the batch could not take (above all beyond the cap) the learning rate decays by."""
        rung = self.rung(progress.stage, batch)
        warm = lr.decay.warm(progress.ledger.applied, batch, span)
        return warm * self.factor**-progress.stage * rung.ratio**self.power


class Seesaw(Replacing):
    """Where η would be divided by δ: η/√δ and b·δ (arXiv 2510.14717)."""

    kind: Literal["seesaw"] = "seesaw"
    power: ClassVar[float] = 0.5


class Increase(Replacing):
    """Where η would be divided by δ: b·δ instead (Smith et al. 2017, AdaBatch)."""

    kind: Literal["increase"] = "increase"
    power: ClassVar[float] = 1.0


class TauNice(Ladder):
    """The best constant batch of SGD on a strongly convex finite sum whose constants are known (Alfarra et al. 2020).

    τ* = n(κ − (L_max − L))/(κ + nL − L_max), κ = 2h̄/(εμ), as a whole number of samples; tau_nice.py has the symbols.
    """

    kind: Literal["tau_nice"] = "tau_nice"
    start: int = Field(default=0, init=False, exclude=True)
    samples: Annotated[int, Field(ge=2)]
    """n, samples of the training set."""
    smoothness: PosFloat
    """L of the mean loss."""
    largest_smoothness: PosFloat
    """L_max, the largest of any sample's loss; between L and nL."""
    mu: PosFloat
    """μ, strong convexity."""
    optimum_sq: PosFloat
    """h̄, mean squared norm of the samples' gradients at the optimum."""
    epsilon: PosFloat
    """ε, target of E‖θ − θ*‖²."""

    @model_validator(mode="before")
    @classmethod
    def _start_is_the_best(cls, values: Any) -> Any:
        if isinstance(values, dict) and "start" in values:
            raise ConfigError("start follows from the constants; remove it")
        names = ("samples", "smoothness", "largest_smoothness", "mu", "optimum_sq")
        try:
            constants = FiniteSum(**{name: values[name] for name in names})
            return {**values, "start": constants.best_whole_batch(values["epsilon"])}
        except (KeyError, TypeError):
            return values  # told by the checks of the fields themselves
        except ArithmeticError:
            given = ", ".join(f"{name}={values[name]}" for name in (*names, "epsilon"))
            raise ConfigError(f"{given}: no best batch follows from these; give positive numbers nearer to 1") from None

    @property
    def plain_sgd(self) -> bool:
        return True

    @property
    def top(self) -> float:
        return 0

    def boundaries(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        if span.epoch != self.samples:
            raise ConfigError(f"growth.samples={self.samples}, but the training set has {span.epoch}; give that number")
        return super().boundaries(stages, lr, span)


Growth = Annotated[
    Auto
    | Constant
    | Linear
    | Exponential
    | Steps
    | Optimal
    | Late
    | Seesaw
    | Increase
    | TauNice
    | NormThreshold
    | ProgressTest
    | Tracking
    | NoiseScale
    | CABS
    | Temperature
    | AdaScale,
    Field(discriminator="kind"),
]
