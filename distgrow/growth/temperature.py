"""Growth that sets the temperature η/b^p and lets the batch follow it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, NoDecay, Span
from distgrow.core.noise_stats import Noise
from distgrow.core.progress import Progress
from distgrow.core.spec import PosFloat, at_least, by_position, one_of
from distgrow.core.stages import Axis, Following, Later, MinStage, Stages, Trigger
from distgrow.growth.adaptive import Adaptive
from distgrow.growth.adascale import gain
from distgrow.growth.base import Measure, Moment, needs_samples
from distgrow.theory.noise import noise_scale


class Plateau(MinStage):
    """When the loss has stopped falling: its least squares line since the last change falls too little."""

    fall: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the mean loss that it has to fall by over `epochs` or `samples`, which are also waited for."""

    @model_validator(mode="after")
    def _has_a_length(self) -> "Plateau":
        one_of(self, "epochs", "samples")
        return self

    def reached(self, noise: Noise, epoch: int) -> bool:
        """Return whether the temperature has to fall."""
        trend, length = noise.trend, self.length(epoch)
        return self.over(trend.samples, trend.count, epoch) and -trend.slope * length < self.fall * abs(trend.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cooling:
    """The soonest that plateaus, each `length` samples long, can have brought the temperature down to level(m)."""

    length: int
    step: float  #: the temperature's factor at a plateau, below 1
    level: Callable[[int], float]
    axis: Axis = field(default="samples", init=False)

    def end(self, stage: int) -> float:
        return self.length * max(0, at_least(math.log(self.level(stage)) / math.log(self.step)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drops:
    """Hold what plateaus have done so far."""

    drops: int = 0  #: plateaus at which the temperature fell


class Temperature(Adaptive):
    """The temperature T = η/b^p falls along lr.decay or at plateaus; the batch is as large as three limits allow [D].

    They are η = T·b^p ≤ lr_max, b ≤ share·B_simple where that is measured, and the cap; beyond it η falls with T. The
    batch is one of b₀·δ^m and never falls; η follows T at every update.
    """

    kind: Literal["temperature"] = "temperature"
    brings_rule: ClassVar[bool] = True
    old_keys: ClassVar[Mapping[str, str]] = {"dwell": "min_stage"}
    power: Annotated[float, Field(gt=0, le=1)] = 1.0
    """p: 1 for SGD, 0.5 for Adam-like optimizers."""
    lr_max: PosFloat | None = None
    """Largest learning rate that is stable; default: lr.base, which T begins at: lr.base/start^p."""
    share: PosFloat | None = None
    """Limit of b/B_simple, B_simple = tr Σ/|∇f|² as measured; none: nothing is measured for it."""
    gain: bool = False
    """η = T·b₀^p times AdaScale's gain in place of (b/b₀)^p: where the gain is less, the temperature is too."""
    plateau: Plateau | None = None
    """T falls by δ^p whenever the training loss has stopped to fall, in place of lr.decay; none: it does not."""
    min_stage: MinStage = MinStage(epochs=0.1, updates=10)
    """How long a stage is at least where something is measured; its updates are measured ones."""
    confidence: Annotated[float, Field(ge=0)] = 1.0
    """Standard errors of the measured means that the lower end of B_simple is away."""

    @property
    def adaptive(self) -> bool:
        return bool(self.needs)

    @property
    def goes_by_rate(self) -> bool:
        return self.lr_max is not None

    @property
    def needs(self) -> frozenset[Measure]:
        noise = {Measure.NOISE} if self.gain or self.share is not None else set[Measure]()
        return frozenset(noise if self.plateau is None else noise | {Measure.LOSS})

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        never = super().trigger(stages, lr, span)
        limit, decays = self.limit(lr), not isinstance(lr.decay, NoDecay)
        if limit < lr.initial:
            raise ConfigError(
                f"growth.lr_max={limit:g} is below lr.base={lr.initial:g}, which the temperature begins at"
            )
        if self.plateau is not None and decays:
            raise ConfigError("growth.plateau and lr.decay both let the temperature fall: give one of them")
        if self.plateau is None and not decays and limit == lr.initial:
            raise ConfigError(
                "the temperature never falls, so no batch could grow: set lr.decay or growth.plateau, or growth.lr_max "
                "above lr.base"
            )
        if self.adaptive:
            return never
        needs_samples("growth.kind=temperature", span)
        return self._following(lr, span)

    def earliest(self, lr: LR, span: Span) -> Trigger:
        spaced = self.earliest_ends(self.min_stage, span, stages_at_once=max(1, int(self.cap_stage)))
        if self.plateau is not None:
            length, step = self.plateau.length(span.epoch), self.factor**-self.power
            level = (lambda _: 1.0) if self.gain else (lambda stage: self.level(stage + 1, lr))
            return Later(one=spaced, other=Cooling(length=length, step=step, level=level))
        return spaced if self.gain or not span.samples else Later(one=spaced, other=self._following(lr, span))

    def advance(self, progress: Progress, now: Moment) -> Progress:
        if self._at_plateau(progress, now):
            drops = asdict(Drops(drops=self._drops(progress) + 1))
            progress = replace(progress, policy=drops, noise=progress.noise.on_new_stage())
        return super().advance(progress, now)

    def stages_up(self, progress: Progress, now: Moment) -> int:
        seen = progress.noise.fresh if Measure.NOISE in self.needs else progress.stage_step
        if not self.min_stage.over(progress.stage_samples, seen, now.epoch):
            return 0
        room, fallen = self.room(progress.noise), self.fallen(now.settings, progress, now.span)
        most = min(self.last_stage, progress.stage + 1 if room == math.inf else math.inf)
        stage = progress.stage
        while stage < most and self.stage_batch(stage + 1) <= room:
            if fallen > self.level(stage + 1, now.settings, progress.noise) * (1 + 1e-9):
                break
            stage += 1
        return stage - progress.stage

    def _at_plateau(self, progress: Progress, now: Moment) -> bool:
        """Return whether the temperature falls now. It does not below 1e-12 of its first value: nothing moves there."""
        can_fall = self._drops(progress) < 12 / (self.power * math.log10(self.factor))
        return can_fall and self.plateau is not None and self.plateau.reached(progress.noise, now.epoch)

    def _drops(self, progress: Progress) -> int:
        return Drops(**progress.policy).drops

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        """Return T·b^p over η₀, or T·b₀^p times the gain."""
        warm = lr.decay.warm(progress.ledger.applied, batch, span)
        scaled = self.scaled(self.grown(progress.stage, batch).ratio, progress.noise)
        return warm * min(self.limit(lr) / lr.initial, scaled * self.fallen(lr, progress, span))

    def rate_growth(self, lr: LR, progress: Progress, batch: int) -> float:
        return self.scaled(self.grown(progress.stage, batch).ratio, progress.noise)

    def highest_rate(self, lr: LR, stage: int, rate: float) -> float:
        ratio = self.stage_batch(stage) / self.start
        return min(self.limit(lr), rate * ratio**self.power) if self.gain else rate

    def fallen(self, lr: LR, progress: Progress, span: Span) -> float:
        """Return the temperature divided by its first value."""
        return lr.decay.fall(progress.ledger.applied, span) * self.factor ** (-self.power * self._drops(progress))

    def limit(self, lr: LR) -> float:
        """Return the largest learning rate."""
        return lr.initial if self.lr_max is None else self.lr_max

    def level(self, stage: int, lr: LR, noise: Noise | None = None) -> float:
        """Return the temperature, over its first value, at which `stage` is stable."""
        return self.limit(lr) / lr.initial / self.scaled(self.stage_batch(stage) / self.start, noise or Noise())

    def scaled(self, ratio: float, noise: Noise) -> float:
        """Return η over that of b₀ at the same temperature, for a batch of ratio·b₀."""
        return gain(ratio, self.start, noise, self.power) if self.gain else ratio**self.power

    def room(self, noise: Noise) -> float:
        """Return the largest batch that the noise scale allows, samples; inf if the gradient is lost in noise."""
        if self.share is None:
            return float(self.stage_batch(int(self.last_stage)))
        variance = noise.variance.end(-self.confidence)
        gradient_sq = noise.grad_sq.end(self.confidence)
        return self.share * noise_scale(variance, gradient_sq) if variance > 0 else 0.0

    def _following(self, lr: LR, span: Span) -> Trigger:
        return Following(decay=lr.decay, span=span, level=lambda stage: self.level(stage + 1, lr))


temperature = by_position(Temperature, "start", "cap", "factor")
plateau = by_position(Plateau)
