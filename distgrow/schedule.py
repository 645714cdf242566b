"""Growth ladders, triggers and budgets: frozen specs that are callables; pure, and the only place that knows them.

A ladder maps a stage to a batch size; a trigger says where stages end. Stage boundaries are absolute
positions on the samples or the steps axis, so that overshooting one by part of a batch never adds up.
"""

import math
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from distgrow.lr import LR, Decay, NoDecay, Rule, Rung, Span, Sqrt
from distgrow.progress import Progress
from distgrow.spec import ConfigError, PosFloat, PosInt, Spec, at_least, one_of
from distgrow.theory import optimal_sample_ratio

Axis = Literal["samples", "steps"]


# ── triggers: where stages end ──────────────────────────────────────────────────────────────────────────────────


class Trigger(Protocol):
    """Where stages end. `end` never falls along the ladder."""

    @property
    def axis(self) -> Axis: ...

    def end(self, stage: int) -> float:
        """First position on the axis at which `stage` is over; inf where it never is."""
        ...


def climb(trigger: Trigger, stage: int, position: int, top: float) -> int:
    """The stage that `position` on the trigger's axis belongs to: `stage` or one above it, never beyond `top`."""
    while stage < top and trigger.end(stage) <= position:
        stage += 1
    return stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometric:
    """Stage m is first·ratio^m long; ratio 1 makes all stages equal."""

    axis: Axis
    first: float
    ratio: float = 1.0

    def end(self, stage: int) -> float:
        if self.ratio == 1.0:
            return at_least(self.first * (stage + 1))
        try:
            return at_least(self.first * (self.ratio ** (stage + 1) - 1) / (self.ratio - 1))
        except OverflowError:
            return math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """Stage m ends at ends[m]; the last stage never ends."""

    axis: Axis
    ends: tuple[int, ...]

    def end(self, stage: int) -> float:
        return self.ends[stage] if stage < len(self.ends) else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """Stage m ends where the decay has fallen to factor^−(m+1)."""

    decay: Decay
    factor: float
    span: Span
    axis: Axis = field(default="samples", init=False)

    def end(self, stage: int) -> float:
        level = self.factor ** -(stage + 1) * (1 + 1e-9)
        below, above = -1, self.span.samples
        if self.decay.fall(above, self.span) > level:
            return math.inf
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (below, middle) if self.decay.fall(middle, self.span) <= level else (middle, above)
        return above


# ── stage lengths and budgets ───────────────────────────────────────────────────────────────────────────────────


class Every(Spec):
    """The length of a stage, or the lengths of all but the last."""

    epochs: PosFloat | Annotated[list[PosFloat], Field(min_length=1)] | None = None
    """Passes over the training set."""
    samples: PosInt | Annotated[list[PosInt], Field(min_length=1)] | None = None
    """Samples."""
    steps: PosInt | Annotated[list[PosInt], Field(min_length=1)] | None = None
    """Updates."""

    @model_validator(mode="after")
    def _one_unit(self) -> "Every":
        one_of(self, "epochs", "samples", "steps")
        return self

    def lengths(self, epoch: int) -> tuple[Axis, list[float]]:
        """The axis and the lengths on it; ValueError where a stage would be shorter than one sample."""
        unit = one_of(self, "epochs", "samples", "steps")
        value = getattr(self, unit)
        values = value if isinstance(value, list) else [value]
        lengths = [v * epoch if unit == "epochs" else v for v in values]
        if min(lengths) < 1:
            raise ConfigError(f"stages.every.{unit}={value} makes a stage shorter than one sample; make it longer")
        return ("steps" if unit == "steps" else "samples"), lengths


class Stages(Spec):
    """How long stages are."""

    every: Every = Every(epochs=5)
    """Length of each stage: {epochs: …}, {samples: …} or {steps: …}; a list gives each stage its own."""
    power: Annotated[float, Field(ge=0)] = 0.0
    """Stage m is e₀·δ^(power·m) long, δ = growth.factor; 0 makes all stages equal."""

    def trigger(self, ratio: float, epoch: int) -> Trigger:
        """The boundaries, when every stage is `ratio` times as long as the one before."""
        axis, lengths = self.every.lengths(epoch)
        unit = one_of(self.every, "epochs", "samples", "steps")
        if not isinstance(getattr(self.every, unit), list):
            return Geometric(axis=axis, first=lengths[0], ratio=ratio)
        if ratio != 1.0:
            raise ConfigError(f"stages.power={self.power} and a list of lengths in stages.every: give one of them")
        return Listed(axis=axis, ends=tuple(at_least(math.fsum(lengths[: k + 1])) for k in range(len(lengths))))


class Budget(Spec):
    """When a run is over: exactly one of the four."""

    epochs: PosFloat | None = None
    """Passes over the training set, counted in applied samples."""
    samples: PosInt | None = None
    """Applied samples."""
    steps: PosInt | None = None
    """Applied updates."""
    sfo: PosInt | None = None
    """Gradient evaluations: applied, skipped and probes; work that a fault makes redo is not charged to it."""

    @model_validator(mode="after")
    def _one_unit(self) -> "Budget":
        one_of(self, "epochs", "samples", "steps", "sfo")
        return self

    def total(self, epoch: int) -> int | None:
        """Samples that the budget allows, or None where it is in steps."""
        if self.epochs is not None:
            return max(1, at_least(self.epochs * epoch))
        return self.samples if self.sfo is None else self.sfo

    def left(self, progress: Progress, epoch: int) -> float:
        """Samples left, inf where the budget is in steps and some are left."""
        total = self.total(epoch)
        if total is None:
            return math.inf if progress.step < (self.steps or 0) else 0
        return total - (progress.ledger.applied if self.sfo is None else progress.ledger.first_time)


# ── growth: stage → batch ───────────────────────────────────────────────────────────────────────────────────────


class Ladder(Spec):
    """What all ladders share; subclasses give `__call__`, `top` and `height`."""

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

    factor: Annotated[float, Field(gt=1)] = 2.0
    """δ, the batch's factor at each stage; above 1."""

    @cached_property
    def full_height(self) -> float:
        """log_δ(cap/b₀), where the cap is met."""
        return math.inf if self.cap is None else math.log(self.cap / self.start) / math.log(self.factor)

    @property
    def top(self) -> float:
        return math.inf if self.cap is None else at_least(self.full_height)

    def __call__(self, stage: int) -> int:
        if self.cap is not None and stage >= self.full_height:
            return self.cap
        try:
            batch = at_least(self.start * self.factor**stage)
        except OverflowError:
            batch = sys.maxsize
        return batch if self.cap is None else min(batch, self.cap)

    def height(self, stage: int) -> float:
        return min(float(stage), self.full_height)


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
        return {**values, "start": batches[0]} if isinstance(batches, list) and batches else values

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


def rule_of(lr: LR) -> Rule:
    """The LR rule, the paper's guideline √b where none is given."""
    return lr.rule if lr.rule is not None else Sqrt()
