"""AdaScale: a batch schedule whose learning rate follows the measured gain (arXiv 2007.05105)."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, NoDecay, Span, StepDecay
from distgrow.core.noise_stats import Noise
from distgrow.core.progress import Progress
from distgrow.core.spec import PosInt, by_position, one_of
from distgrow.core.stages import Stages, Trigger
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.constant import Constant
from distgrow.growth.scheduled import Plain
from distgrow.theory.noise import adascale_gain


class AdaScale(GrowthPolicy):
    """A plain ladder whose learning rate is η₀ times AdaScale's gain, as measured (Johnson et al. 2020).

    The gain (σ² + |∇f|²)/(σ²/s + |∇f|²), σ² = tr Σ/b₀ and s = b/b₀, lies between 1 and s: an update at b is worth so
    many at b₀. A decay runs on what the updates are worth, b₀·gain samples each, so it falls as it would have at b₀;
    the budget, as always, is what is spent. Until noise has been measured the gain is 1.
    """

    kind: Literal["adascale"] = "adascale"
    brings_rule: ClassVar[bool] = True
    start: PosInt = 16
    """b₀, samples of the batch that lr.base is meant for."""
    scale: PosInt | None = None
    """s, for a batch of s·b₀ throughout."""
    ladder: Plain | None = None
    """Growth of kind constant, linear, exponential or list, in place of `scale`; it begins at b₀ or above."""
    power: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Power of the gain that multiplies η₀: 1 for SGD, 0.5 for Adam."""

    @model_validator(mode="after")
    def _one_ladder(self) -> "AdaScale":
        one_of(self, "scale", "ladder")
        least = min(self.plain(stage) for stage in range(int(min(self.plain.top, 1000)) + 1))
        if least < self.start:
            raise ConfigError(f"growth.ladder falls to {least} samples, below growth.start={self.start}; lower start")
        return self

    @property
    def plain(self) -> GrowthPolicy:
        """Return the schedule of the batch."""
        return self.ladder or Constant(start=self.start * (self.scale or 1))

    @property
    def measures(self) -> bool:
        return True

    @property
    def top(self) -> float:
        return self.plain.top

    def __call__(self, stage: int) -> int:
        return self.plain(stage)

    def boundaries(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        if not isinstance(lr.decay, NoDecay | StepDecay):
            raise ConfigError(
                f"growth.kind=adascale counts what updates are worth, of which the budget's end is not known: "
                f"lr.decay.kind={lr.decay.kind} has to be step or none"
            )
        return self.plain.boundaries(stages, lr, span)

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        ratio = self.rung(progress.stage, batch).ratio
        return gain(ratio, self.start, progress.noise, self.power) * lr.decay.fall(int(progress.worth), span)

    def most(self, lr: LR, stage: int, rate: float) -> float:
        return rate * (self(stage) / self.start) ** self.power

    def worth(self, progress: Progress, batch: int, span: Span) -> float:
        ratio = self.rung(progress.stage, batch).ratio
        return self.start * gain(ratio, self.start, progress.noise, 1.0)

    def remarks(self) -> list[str]:
        return ["lr is shown as if AdaScale's gain were 1; it is between 1 and b/b₀"]


def gain(ratio: float, start: int, noise: Noise, power: float) -> float:
    """Return AdaScale's gain of a batch of ratio·b₀ by what has been measured, or 1 before that."""
    variance, gradient_sq = noise.variance.value, noise.grad_sq.value
    if math.isnan(gradient_sq):
        return 1.0
    return adascale_gain(max(1.0, ratio), max(0.0, variance) / start, max(0.0, gradient_sq), power)


adascale = by_position(AdaScale, "start")
