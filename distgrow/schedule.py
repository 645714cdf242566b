"""Growth: ladders from a stage to its batch size, and how the learning rate goes with them; pure frozen specs."""

import math
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.lr import LR, NoDecay, Rule, Rung, Span, Sqrt
from distgrow.progress import Progress
from distgrow.spec import ConfigError, PosInt, Spec, at_least
from distgrow.stages import Following, Geometric, Listed, Stages, Trigger
from distgrow.theory import optimal_sample_ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What an adaptive ladder may know of the coming update beside the progress, were it made without a move."""

    lr: float
    batch: int
    epoch: int  #: samples of one pass over the training set


class Ladder(Spec):
    """What all ladders share; subclasses give `__call__`, `top` and `height`."""

    adaptive: ClassVar[bool] = False  #: whether measurements move it, through `moves`
    measures: ClassVar[bool] = False  #: whether it goes by measured gradient noise
    tests_progress: ClassVar[bool] = False  #: whether it goes by the product of gradients and updates

    start: PosInt = 16
    """b₀, samples in the first stage's global batch."""

    @property
    def top(self) -> float:
        """The last stage that changes anything; inf where there is none."""
        return math.inf

    def __call__(self, stage: int) -> int:
        """Target batch of a stage, samples."""
        return self.start

    def height(self, stage: int) -> float:
        """Growth steps taken at `stage`, fractional where the cap cut the last one short."""
        return float(stage)

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        """Where this ladder's stages end."""
        if stages.power:
            raise ConfigError(f"stages.power={stages.power} needs a growth factor; use growth.kind: exponential")
        return stages.trigger(1.0, span.epoch)

    def moves(self, progress: Progress, now: Moment) -> int:
        """Rungs that an adaptive ladder climbs before the coming update; mostly 0."""
        return 0

    def probe_due(self, progress: Progress) -> bool:
        """Whether ‖∇f‖ has to be measured exactly before the coming update."""
        return False

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        """η/η₀ of an update of `batch` samples: the rule's, times the decay's."""
        rung = self.rung(progress.stage, batch)
        samples = progress.ledger.applied
        return rule_of(lr)(rung) * lr.decay.warm(samples, batch, span) * lr.decay.fall(samples, span)

    def rung(self, stage: int, batch: int) -> Rung:
        """The rung of `stage` for a batch that may be a shortened last one."""
        return Rung(ratio=min(batch, self(stage)) / self.start, height=self.height(stage))


class Constant(Ladder):
    """b₀ throughout."""

    kind: Literal["constant"] = "constant"

    @property
    def top(self) -> float:
        return 0


class Capped(Ladder):
    """A ladder that stops at `cap`."""

    cap: PosInt | None = None
    """Largest global batch; none: it grows for as long as the budget lasts."""

    @model_validator(mode="after")
    def _start_below_cap(self) -> "Capped":
        if self.cap is not None and self.start > self.cap:
            raise ConfigError(f"start={self.start} is above cap={self.cap}; lower start or raise cap")
        return self


class Linear(Capped):
    """b₀ + c·m."""

    kind: Literal["linear"] = "linear"
    increment: PosInt = 16
    """c, samples added at each stage."""

    @property
    def top(self) -> float:
        return math.inf if self.cap is None else -(-(self.cap - self.start) // self.increment)

    def __call__(self, stage: int) -> int:
        batch = self.start + self.increment * stage
        return batch if self.cap is None else min(batch, self.cap)

    def height(self, stage: int) -> float:
        return float(stage) if self.cap is None else min(stage, (self.cap - self.start) / self.increment)


class Geometrical(Capped):
    """What the ladders b₀·δ^m share."""

    factor: Annotated[float, Field(gt=1, le=1e6)] = 2.0
    """δ, the batch's factor at each stage; above 1."""

    @property
    def top(self) -> float:
        return self.cap_stage

    @cached_property
    def cap_stage(self) -> float:
        """The first stage at which the batch, rounded up, is the cap."""
        if self.cap is None:
            return math.inf
        stage = max(0, math.ceil(self._height_of(max(self.start, self.cap - 1))) - 1)
        while self._uncapped(stage) < self.cap:
            stage += 1
        return stage

    def __call__(self, stage: int) -> int:
        batch = self._uncapped(stage)
        return batch if self.cap is None else min(batch, self.cap)

    def height(self, stage: int) -> float:
        return min(float(stage), self.cap_stage, self._height_of(self.cap or math.inf))

    def _uncapped(self, stage: int) -> int:
        try:
            return at_least(self.start * self.factor**stage)
        except OverflowError:
            return sys.maxsize

    def _height_of(self, batch: float) -> float:
        """log_δ(batch/b₀)."""
        return math.log(batch / self.start) / math.log(self.factor)


class Exponential(Geometrical):
    """min(cap, ⌈b₀·δ^m⌉)."""

    kind: Literal["exponential"] = "exponential"

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        return stages.trigger(self.factor**stages.power, span.epoch)


class Steps(Ladder):
    """An explicit list of batch sizes."""

    kind: Literal["list"] = "list"
    start: int = Field(default=0, init=False, exclude=True)
    batches: Annotated[list[PosInt], Field(min_length=1)]
    """The batch of each stage; it stays at the last."""

    @model_validator(mode="before")
    @classmethod
    def _start_is_the_first(cls, values: Any) -> Any:
        if isinstance(values, dict) and "start" in values:
            raise ConfigError("start is the first of batches; remove it")
        batches = values.get("batches") if isinstance(values, dict) else None
        if not isinstance(batches, list) or not batches or not isinstance(batches[0], int) or batches[0] < 1:
            return values  # told by the check of batches itself
        return {**values, "start": batches[0]}

    @property
    def top(self) -> float:
        return len(self.batches) - 1

    def __call__(self, stage: int) -> int:
        return self.batches[min(stage, len(self.batches) - 1)]

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        trigger = super().trigger(stages, lr, span)
        if isinstance(trigger, Listed) and len(trigger.ends) not in (self.top, self.top + 1):
            raise ConfigError(f"growth.batches has {len(self.batches)} stages, stages.every gives {len(trigger.ends)}")
        return trigger


class Optimal(Geometrical):
    """Exponential growth whose stage lengths are optimal for δ, γ (of lr.rule) and the budget: samples ∝ (δ/γ)^2m."""

    kind: Literal["optimal"] = "optimal"

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        if self.cap is None:
            raise ConfigError("growth.kind=optimal cuts the budget into the stages up to the cap: set growth.cap")
        _needs_samples("optimal", span)
        count, ratio = int(self.top) + 1, optimal_sample_ratio(self.factor, rule_of(lr).factor_for(self.factor))
        first = span.samples / math.fsum(ratio**m for m in range(count))
        shortest = first * min(1.0, ratio ** (count - 1))
        if shortest < 1:
            raise ConfigError(
                f"growth.kind=optimal: the shortest of {count} stages would have {shortest:.3g} samples; "
                "raise budget, lower growth.cap or bring lr.rule closer to sqrt"
            )
        return Geometric(axis="samples", first=first, ratio=ratio)


class Replacing(Geometrical):
    """Growth in place of the LR's decay: wherever the decay has fallen by another δ, the batch grows by δ."""

    name: ClassVar[str]
    power: ClassVar[float]

    @property
    def top(self) -> float:
        return math.inf

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        if isinstance(lr.decay, NoDecay):
            raise ConfigError(f"{self.name} growth replaces a decay: set lr.decay to step, cosine or wsd")
        if lr.rule is not None:
            raise ConfigError(f"{self.name} growth brings its own LR rule: remove lr.rule")
        _needs_samples(self.name, span)
        return Following(decay=lr.decay, factor=self.factor, span=span)

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        """δ^−m·(b/b₀)^power: what the batch could not take (above all beyond the cap) the learning rate decays by."""
        rung = self.rung(progress.stage, batch)
        warm = lr.decay.warm(progress.ledger.applied, batch, span)
        return warm * self.factor**-progress.stage * rung.ratio**self.power


class Seesaw(Replacing):
    """Where η would be divided by δ: η/√δ and b·δ (arXiv 2510.14717)."""

    kind: Literal["seesaw"] = "seesaw"
    name: ClassVar[str] = "seesaw"
    power: ClassVar[float] = 0.5


class Increase(Replacing):
    """Where η would be divided by δ: b·δ instead (Smith et al. 2017, AdaBatch)."""

    kind: Literal["increase"] = "increase"
    name: ClassVar[str] = "increase"
    power: ClassVar[float] = 1.0


Growth = Annotated[Constant | Linear | Exponential | Steps | Optimal | Seesaw | Increase, Field(discriminator="kind")]


def _needs_samples(kind: str, span: Span) -> None:
    if not span.samples:
        raise ConfigError(
            f"growth.kind={kind} sets its stages on the samples axis, where budget.steps has no end: "
            "give budget.epochs, budget.samples or budget.sfo"
        )


def rule_of(lr: LR) -> Rule:
    """The LR rule, the paper's guideline √b where none is given."""
    return lr.rule if lr.rule is not None else Sqrt()
