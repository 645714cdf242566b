"""What policies share that follow a target batch computed from measured gradient noise."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distgrow.core.lr import LR, Rule, Span
from distgrow.core.lr import Constant as ConstantRule
from distgrow.core.noise_stats import Noise
from distgrow.core.progress import Progress
from distgrow.core.spec import PosInt
from distgrow.core.stages import MinStage, Trigger
from distgrow.growth.adaptive import Adaptive
from distgrow.growth.base import Measure, Moment


class TargetBatch(Adaptive):
    """Growth to the stage whose batch is nearest to a measured batch size, by the distance of logarithms.

    The batch never falls, even if the measured size does. η is constant unless lr.rule says otherwise.
    """

    default_rule: ClassVar[Rule] = ConstantRule()
    old_keys: ClassVar[Mapping[str, str]] = {"dwell": "min_stage", "rungs": "stages_at_once"}
    min_stage: MinStage = MinStage(epochs=0.1, updates=10)
    """How long a stage is at least; its updates are measured ones."""
    hysteresis: Annotated[float, Field(ge=1)] = 1.1
    """Factor by which the measured size has to be beyond the middle between two stages, √(b_m·b_{m+1})."""
    confidence: Annotated[float, Field(ge=0)] = 1.0
    """Standard errors of the measured means that the lower end of the measured size is away; 0: the means alone."""
    stages_at_once: PosInt = 2
    """Stages to go up by at once, at most. It is 1 if the gradient is lost in noise, and beyond the cap."""

    @property
    def needs(self) -> frozenset[Measure]:
        return frozenset({Measure.NOISE})

    @abstractmethod
    def target(self, variance: float, gradient_sq: float, progress: Progress, now: Moment) -> float:
        """Return the batch size to follow for tr Σ above 0 and |∇f|², samples; inf if |∇f|² is lost in noise."""

    def earliest(self, lr: LR, span: Span) -> Trigger:
        return self.earliest_ends(self.min_stage, span, self.stages_at_once)

    def stages_up(self, progress: Progress, now: Moment) -> int:
        stage, noise = progress.stage, progress.noise
        if stage >= self.last_stage or not self.min_stage.over(progress.stage_samples, noise.fresh, now.epoch):
            return 0
        variance, gradient_sq = self.ends(noise)
        if not variance > 0:
            return 0
        target = self.target(variance, gradient_sq, progress, now)
        steady = stage < self.cap_stage and math.isfinite(target)
        most = min(stage + self.stages_at_once, self.cap_stage) if steady else stage + 1
        aim = stage
        while aim < most and target >= self.edge(aim):
            aim += 1
        return aim - stage

    def edge(self, stage: int) -> float:
        """Return the measured size from which on the stage after `stage` is taken, samples."""
        try:
            return self.hysteresis * self.start * self.factor ** (stage + 0.5)
        except OverflowError:
            return math.inf

    def ends(self, noise: Noise) -> tuple[float, float]:
        """Return the lower end of tr Σ and the upper end of |∇f|²: those of the smallest batch."""
        return noise.variance.end(-self.confidence), noise.grad_sq.end(self.confidence)


class NoiseRatio(TargetBatch):
    """Growth that follows the noise scale tr Σ/|∇f|², or that of an adaptive optimizer's steps, tr(PΣ)/(∇fᵀP∇f)."""

    norm: Literal["plain", "preconditioned"] = "plain"
    """The metric of gradients. preconditioned: that of AdamW's steps, P = 1/(√v̂ + ε), one number a parameter."""

    @property
    def needs(self) -> frozenset[Measure]:
        return super().needs | frozenset({Measure.PRECONDITIONED} if self.norm == "preconditioned" else ())
