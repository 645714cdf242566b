"""Ladders that follow a batch size worked out from measured gradient noise; pure frozen specs."""

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.core.lr import LR, Rule, Span
from distgrow.core.lr import Constant as ConstantRule
from distgrow.core.noise_stats import Noise
from distgrow.core.progress import Progress
from distgrow.core.spec import ConfigError, PosFloat, PosInt, one_of
from distgrow.core.stages import Dwell, Stages, Trigger
from distgrow.growth.adaptive import Adaptive, Endless
from distgrow.growth.base import Moment
from distgrow.theory.noise import cabs_batch, critical_batch_now, noise_scale


class Tracker(Adaptive):
    """What ladders share that climb to the rung next to a measured batch size, by the distance of logarithms.

    They only climb: where the measured size falls, the batch stays. η is constant unless lr.rule says else.
    """

    default_rule: ClassVar[Rule] = ConstantRule()
    dwell: Dwell = Dwell(epochs=0.1, updates=10)
    """How long a stage is at least; its updates are measured ones."""
    hysteresis: Annotated[float, Field(ge=1)] = 1.1
    """Factor by which the measured size has to be beyond the middle between two rungs, √(b_m·b_{m+1})."""
    confidence: Annotated[float, Field(ge=0)] = 1.0
    """Standard errors of the measured means that the lower end of the measured size is away; 0: the means alone."""
    rungs: PosInt = 2
    """Rungs climbed at once, at most; one where the gradient is lost in noise, and beyond the cap."""

    @property
    def measures(self) -> bool:
        return True

    @abstractmethod
    def target(self, variance: float, gradient_sq: float, progress: Progress, now: Moment) -> float:
        """The batch size to follow for tr Σ above 0 and |∇f|², samples; inf where |∇f|² is lost in noise."""

    def earliest(self, lr: LR, span: Span) -> Trigger:
        return self.soonest(self.dwell, span, self.rungs)

    def moves(self, progress: Progress, now: Moment) -> int:
        stage, noise = progress.stage, progress.noise
        if stage >= self.top or not self.dwell.over(progress.stage_samples, noise.fresh, now.epoch):
            return 0
        variance, gradient_sq = self.ends(noise)
        if not variance > 0:
            return 0
        target = self.target(variance, gradient_sq, progress, now)
        steady = stage < self.cap_stage and math.isfinite(target)
        most = min(stage + self.rungs, self.cap_stage) if steady else stage + 1
        rung = stage
        while rung < most and target >= self.edge(rung):
            rung += 1
        return rung - stage

    def edge(self, rung: int) -> float:
        """The measured size from which on the rung after `rung` is climbed, samples."""
        try:
            return self.hysteresis * self.start * self.factor ** (rung + 0.5)
        except OverflowError:
            return math.inf

    def ends(self, noise: Noise) -> tuple[float, float]:
        """Lower end of tr Σ and upper end of |∇f|²: those of the smallest batch."""
        return noise.variance.end(-self.confidence), noise.grad_sq.end(self.confidence)


class Tracking(Tracker, Endless):
    """b follows the critical batch κ·tr Σ/|∇f|²; at the cap η falls with the root of the growth it leaves out [D]."""

    kind: Literal["tracking"] = "tracking"
    decay_power: ClassVar[float] = 0.5
    kappa: PosFloat | None = None
    """κ, the critical batch over tr Σ/|∇f|²."""
    smoothness: PosFloat | None = None
    """L, in place of κ = 2Lη/(2 − Lη), η the learning rate but for its fall at the cap."""

    @model_validator(mode="after")
    def _one_constant(self) -> "Tracking":
        one_of(self, "kappa", "smoothness")
        return self

    @property
    def plain_sgd(self) -> bool:
        return self.smoothness is not None

    def boundaries(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        trigger = super().boundaries(stages, lr, span)
        largest = lr.base * max(self.rule(lr)(self.rung(m, self(m))) for m in range(int(self.cap_stage) + 1))
        if self.smoothness is not None and largest * self.smoothness >= 2:
            raise ConfigError(
                f"growth.smoothness={self.smoothness:g}: the learning rate would reach 2/L, {largest:.4g} of "
                f"{2 / self.smoothness:.4g}; lower lr.base, or growth.cap where lr.rule grows with the batch"
            )
        return trigger

    def target(self, variance: float, gradient_sq: float, progress: Progress, now: Moment) -> float:
        if self.kappa is not None:
            return self.kappa * noise_scale(variance, gradient_sq)
        lr = now.lr / self.shortfall(progress.stage)
        assert self.smoothness is not None
        return critical_batch_now(variance, gradient_sq, lr, self.smoothness) if lr > 0 else 0.0


class NoiseScale(Tracker):
    """b follows the noise scale B_simple = tr Σ/|∇f|² (McCandlish et al. 2018), times `share`."""

    kind: Literal["gns"] = "gns"
    share: PosFloat = 1.0
    """The batch over B_simple: 1 costs twice the fewest gradient evaluations and twice the fewest updates."""

    def target(self, variance: float, gradient_sq: float, progress: Progress, now: Moment) -> float:
        return self.share * noise_scale(variance, gradient_sq)


class CABS(Tracker):
    """b follows η·tr Σ/f (Balles et al. 2017): SGD without momentum, and a loss whose least value is near 0."""

    kind: Literal["cabs"] = "cabs"

    @property
    def plain_sgd(self) -> bool:
        return True

    def target(self, variance: float, gradient_sq: float, progress: Progress, now: Moment) -> float:
        loss = progress.noise.loss.end(self.confidence)
        return cabs_batch(now.lr, variance, loss) if loss > 0 and now.lr > 0 else 0.0
