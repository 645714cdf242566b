"""AdaScale: a batch schedule whose learning rate follows the measured gain (arXiv 2007.05105)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, NoDecay, Span, StepDecay
from distgrow.core.noise_stats import Noise
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, PolicyState, Progress
from distgrow.core.spec import PosInt, by_position, one_of
from distgrow.core.stages import Stages, Trigger
from distgrow.growth.base import GrowthPolicy, Measure
from distgrow.growth.constant import Constant
from distgrow.growth.scheduled import Plain
from distgrow.theory.noise import adascale_gain


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Hold what AdaScale keeps from one update to the next."""

    samples: float = 0.0  #: Σ b₀·gain over the applied updates: samples at b₀ that they count for


class AdaScale(GrowthPolicy):
    """A schedule of batches whose learning rate is η₀ times AdaScale's gain, as measured (Johnson et al. 2020).

    The gain (σ² + |∇f|²)/(σ²/s + |∇f|²), σ² = tr Σ/b₀ and s = b/b₀, lies between 1 and s: one update at b counts
    for that many at b₀. A decay runs on b₀·gain samples for each update, so it falls as it would have at b₀. The budget
    is spent by the samples that are computed, as always. The gain is 1 until noise has been measured.
    """

    kind: Literal["adascale"] = "adascale"
    old_keys: ClassVar[Mapping[str, str]] = {"ladder": "batches"}
    brings_rule: ClassVar[bool] = True
    start: PosInt = 16
    """b₀, samples of the batch that lr.base is meant for."""
    scale: PosInt | None = None
    """s, for a batch of s·b₀ throughout."""
    batches: Plain | None = None
    """Growth of kind constant, linear, exponential or steps, in place of `scale`; it begins at b₀ or above."""
    power: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Power of the gain that multiplies η₀: 1 for SGD, 0.5 for Adam."""

    @model_validator(mode="after")
    def _one_schedule(self) -> "AdaScale":
        one_of(self, "scale", "batches")
        least = min(self.plain.stage_batch(stage) for stage in range(int(min(self.plain.last_stage, 1000)) + 1))
        if least < self.start:
            raise ConfigError(f"growth.batches falls to {least} samples, below growth.start={self.start}; lower start")
        return self

    @property
    def plain(self) -> GrowthPolicy:
        """Return the schedule of the batch."""
        return self.batches or Constant(start=self.start * (self.scale or 1))

    @property
    def needs(self) -> frozenset[Measure]:
        return frozenset({Measure.NOISE})

    @property
    def last_stage(self) -> float:
        return self.plain.last_stage

    def stage_batch(self, stage: int) -> int:
        return self.plain.stage_batch(stage)

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        if not isinstance(lr.decay, NoDecay | StepDecay):
            raise ConfigError(
                f"growth.kind=adascale decays by the measured gain, so where the budget ends is not known: "
                f"lr.decay.kind={lr.decay.kind} has to be step or none"
            )
        return self.plain.trigger(stages, lr, span)

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        ratio, counted = self.grown(progress.stage, batch).ratio, Counted(**progress.policy)
        return gain(ratio, self.start, progress.noise, self.power) * lr.decay.fall(int(counted.samples), span)

    def rate_growth(self, lr: LR, progress: Progress, batch: int) -> float:
        return gain(self.grown(progress.stage, batch).ratio, self.start, progress.noise, self.power)

    def highest_rate(self, lr: LR, stage: int, rate: float) -> float:
        return rate * (self.stage_batch(stage) / self.start) ** self.power

    def after(self, progress: Progress, plan: Plan, outcome: Outcome) -> PolicyState:
        if not outcome.applied:
            return progress.policy
        ratio, counted = self.grown(plan.stage, plan.batch).ratio, Counted(**progress.policy)
        return asdict(Counted(samples=counted.samples + self.start * gain(ratio, self.start, progress.noise, 1.0)))

    def remarks(self) -> Sequence[str]:
        return ["lr is shown as if AdaScale's gain were 1; it is between 1 and b/b₀"]


def gain(ratio: float, start: int, noise: Noise, power: float) -> float:
    """Return AdaScale's gain of a batch of ratio·b₀ by what has been measured, or 1 before that."""
    variance, gradient_sq = noise.variance.value, noise.grad_sq.value
    if math.isnan(gradient_sq):
        return 1.0
    return adascale_gain(max(1.0, ratio), max(0.0, variance) / start, max(0.0, gradient_sq), power)


adascale = by_position(AdaScale, "start")
