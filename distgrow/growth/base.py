"""Ladders: from a stage to its batch size, and how the learning rate goes with it; pure frozen specs."""

import math
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.core.lr import LR, NoDecay, Rule, Rung, Span, Sqrt
from distgrow.core.progress import Progress
from distgrow.core.spec import ConfigError, PosInt, Spec, at_least
from distgrow.core.stages import Listed, Stages, Trigger


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What an adaptive ladder may know of the coming update beside the progress, were it made without a move."""

    lr: float
    batch: int
    epoch: int  #: samples of one pass over the training set
    left: float  #: samples that the budget still allows; inf where it is in steps
    settings: LR
    span: Span


class Ladder(Spec):
    """What all ladders share; subclasses give `__call__`, `top` and `height`."""

    sets_stages: ClassVar[bool] = False  #: whether it has no use for `stages`
    brings_rule: ClassVar[bool] = False  #: whether it has no use for `lr.rule`
    default_rule: ClassVar[Rule] = Sqrt()

    start: PosInt = 16
    """b₀, samples in the first stage's global batch."""

    @property
    def adaptive(self) -> bool:
        """Whether measurements move it, through `moves`."""
        return False

    @property
    def measures(self) -> bool:
        """Whether it goes by measured gradient noise."""
        return False

    @property
    def plain_sgd(self) -> bool:
        """Whether its rule holds for SGD without momentum alone."""
        return False

    @property
    def measures_within(self) -> float:
        """Updates within which noise has to be measured for it to be of use; inf where it can wait."""
        return math.inf

    @property
    def tests_progress(self) -> bool:
        """Whether it goes by the product of gradients and updates."""
        return False

    @property
    def probes_norm(self) -> bool:
        """Whether it goes by exact measurements of ‖∇f‖."""
        return False

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

    @property
    def name(self) -> str:
        """Its `growth.kind`."""
        return type(self).model_fields["kind"].default

    def on(self, span: Span) -> "Ladder":
        """The same, with what depends on the training set and the budget."""
        return self

    # ── when it moves ───────────────────────────────────────────────────────────────────────────────────────────

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        """Where this ladder's stages end. ConfigError where the settings do not go with it."""
        if self.sets_stages and stages != Stages():
            raise ConfigError(f"growth.kind={self.name} sets its own stage lengths: remove stages")
        if self.brings_rule and lr.rule is not None:
            raise ConfigError(f"{self.name} growth brings its own LR rule: remove lr.rule")
        if self.adaptive and not isinstance(lr.decay, NoDecay):
            needs_samples(f"growth.kind={self.name} beside lr.decay", span)
        return self.boundaries(stages, lr, span)

    def boundaries(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        """`trigger`, once the settings are known to go with it."""
        if self.adaptive:
            return Listed(axis="samples", ends=())
        if stages.power:
            raise ConfigError(f"stages.power={stages.power} needs a growth factor; use growth.kind: exponential")
        return stages.trigger(1.0, span.epoch)

    def earliest(self, lr: LR, span: Span) -> Trigger:
        """Where an adaptive ladder's stages could end at the soonest, whatever is measured; no stage beyond the cap."""
        return Listed(axis="samples", ends=())

    def moves(self, progress: Progress, now: Moment) -> int:
        """Rungs that an adaptive ladder climbs before the coming update; mostly 0."""
        return 0

    def cools(self, progress: Progress, now: Moment) -> int:
        """Steps that an adaptive ladder's temperature falls by before it is asked for its moves; mostly 0."""
        return 0

    def probe_due(self, progress: Progress) -> bool:
        """Whether ‖∇f‖ has to be measured exactly before the coming update."""
        return False

    def probes(self, updates: int, stage: int) -> int:
        """Exact measurements of ‖∇f‖ in a run of so many updates that ends at `stage`."""
        return 0

    # ── the learning rate ───────────────────────────────────────────────────────────────────────────────────────

    def rule(self, lr: LR) -> Rule:
        """How the learning rate follows the batch: as asked for, or as suits this growth."""
        return lr.rule if lr.rule is not None else self.default_rule

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        """η/η₀ of an update of `batch` samples: the rule's, times the decay's."""
        rung = self.rung(progress.stage, batch)
        samples = progress.ledger.applied
        return self.rule(lr)(rung) * lr.decay.warm(samples, batch, span) * lr.decay.fall(samples, span)

    def most(self, lr: LR, stage: int, rate: float) -> float:
        """The largest η that measurements can make of `rate`, which is foreseen of an update of `stage`."""
        return rate

    def rung(self, stage: int, batch: int) -> Rung:
        """The rung of `stage` for a batch that may be a shortened last one."""
        return Rung(ratio=min(batch, self(stage)) / self.start, height=self.height(stage))

    def worth(self, progress: Progress, batch: int, span: Span) -> float:
        """Samples at b₀ that an update of `batch` samples is worth, where the ladder counts them; else 0."""
        return 0.0

    def remarks(self) -> list[str]:
        """What `plan` has to say beside the table."""
        return []


class Constant(Ladder):
    """b₀ throughout."""

    kind: Literal["constant"] = "constant"

    @property
    def top(self) -> float:
        return 0


class Capped(Ladder):
    """A ladder that stops at `cap`."""

    cap: PosInt | None = None
    """Largest global batch; none: it grows for as long as the budget lasts, which some kinds refuse."""

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

    def needs_cap(self, why: str) -> int:
        """The cap; ConfigError where there is none."""
        if self.cap is None:
            raise ConfigError(f"growth.kind={self.name} {why}: set growth.cap")
        return self.cap

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

    def boundaries(self, stages: Stages, lr: LR, span: Span) -> Trigger:
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

    def boundaries(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        trigger = super().boundaries(stages, lr, span)
        if isinstance(trigger, Listed) and len(trigger.ends) not in (self.top, self.top + 1):
            raise ConfigError(f"growth.batches has {len(self.batches)} stages, stages.every gives {len(trigger.ends)}")
        return trigger


Plain = Annotated[Constant | Linear | Exponential | Steps, Field(discriminator="kind")]


def needs_samples(what: str, span: Span) -> None:
    """ConfigError where the budget has no end on the samples axis, which `what` needs."""
    if not span.samples:
        raise ConfigError(
            f"{what} goes by the samples axis, where budget.steps has no end: "
            "give budget.epochs, budget.samples or budget.sfo, or choose another growth.kind"
        )
