"""Growth that follows the measured critical batch."""

from typing import ClassVar, Literal

from pydantic import model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Span
from distgrow.core.progress import Progress
from distgrow.core.spec import PosFloat, by_position, one_of
from distgrow.core.stages import Stages, Trigger
from distgrow.growth.adaptive import Endless
from distgrow.growth.base import Moment
from distgrow.growth.target_batch import NoiseRatio
from distgrow.theory.noise import critical_batch_now, noise_scale


class CriticalBatch(NoiseRatio, Endless):
    """b follows the critical batch κ·tr Σ/|∇f|²; at the cap η falls with the root of the growth it leaves out [D]."""

    kind: Literal["critical_batch"] = "critical_batch"
    old_kinds: ClassVar[tuple[str, ...]] = ("tracking",)
    decay_power: ClassVar[float] = 0.5
    kappa: PosFloat | None = None
    """κ, the critical batch over tr Σ/|∇f|²."""
    smoothness: PosFloat | None = None
    """L, in place of κ = 2Lη/(2 − Lη), η the learning rate but for its fall at the cap."""

    @model_validator(mode="after")
    def _one_constant(self) -> "CriticalBatch":
        one_of(self, "kappa", "smoothness")
        return self

    @property
    def plain_sgd(self) -> bool:
        return self.smoothness is not None

    @property
    def goes_by_rate(self) -> bool:
        return self.smoothness is not None

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        trigger = super().trigger(stages, lr, span)
        below = range(int(self.cap_stage) + 1)
        largest = lr.initial * max(self.rule(lr)(self.grown(m, self.stage_batch(m))) for m in below)
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


critical_batch_tracking = by_position(CriticalBatch, "start", "cap", "factor")
