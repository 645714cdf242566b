"""What growth policies share: the protocol, caps and geometric growth."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Grown, NoDecay, Rule, Span, Sqrt
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, PolicyState, Progress
from distgrow.core.spec import PosInt, Spec, at_least
from distgrow.core.stages import Stages, Trigger

#: Kinds whose start and cap can follow from an objective.
AIMED = "auto, exponential, increase, late, matched, optimal or seesaw"


class Measure(StrEnum):
    """Name what a policy can need to be measured. The engine does so only for a policy that needs it."""

    NOISE = "noise"  #: |∇f|² and tr Σ, from gradients of micro-batches, at no gradient evaluations
    PRECONDITIONED = "preconditioned"  #: NOISE in the metric of an adaptive optimizer's steps: Σ P_j·g_j² for Σ g_j²
    LOSS = "loss"  #: the training loss of every update
    PROGRESS = "progress"  #: ⟨g, u⟩ of every gradient g with the direction u of the update before
    NORM = "norm"  #: ‖∇f‖ over the whole training set, whenever the policy asks, at n evaluations each

    __hash__ = str.__hash__  # they are looked up at every update; Enum's own takes many times longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Hold what an adaptive policy may know of the coming update beside the progress, if the stage stays."""

    lr: float
    batch: int
    epoch: int  #: samples of one pass over the training set
    left: float  #: samples that the budget still allows; inf if it is in steps
    settings: LR
    span: Span


class GrowthPolicy(Spec):
    """Decide the batch of every stage, and where stages end.

    A policy gives `stage_batch` and `last_stage`. Everything else has a default: equal stages of the length that the
    config sets, and a learning rate that follows `lr.rule`. A policy that goes by measurements names them in `needs`. A
    policy that keeps numbers of its own returns them from `after`; they are `Progress.policy`, and empty at first.
    """

    sets_stages: ClassVar[bool] = False  #: whether it has no use for `stages`
    brings_rule: ClassVar[bool] = False  #: whether it has no use for `lr.rule`
    default_rule: ClassVar[Rule] = Sqrt()

    start: PosInt = 16
    """b₀, samples in the first stage's global batch."""

    @model_validator(mode="before")
    @classmethod
    def _takes_no_objective(cls, values: Any) -> Any:
        """Refuse an objective by name if start and cap of this growth do not follow from one."""
        if not isinstance(values, dict) or "objective" in cls.model_fields or values.get("objective") is None:
            return values
        kind = cls.model_fields["kind"].default if "kind" in cls.model_fields else cls.__name__
        raise ConfigError(
            f"objective does not go with growth.kind={kind}: it decides start and cap of {AIMED}; use one of these "
            "kinds, or leave objective out"
        )

    @property
    def name(self) -> str:
        """Return the policy's `growth.kind`."""
        return type(self).model_fields["kind"].default

    @property
    def needs(self) -> frozenset[Measure]:
        """Return what has to be measured for the policy."""
        return frozenset()

    @property
    def adaptive(self) -> bool:
        """Return whether measurements decide where stages end. Only then is the policy `Adaptive`."""
        return False

    @property
    def goes_by_rate(self) -> bool:
        """Return whether batches or checks depend on η₀, so that nothing is known of them before η₀ is measured."""
        return False

    @property
    def plain_sgd(self) -> bool:
        """Return whether the policy's rule holds for SGD without momentum alone."""
        return False

    @property
    def held(self) -> str:
        """Return why the batch may never grow, and the way out."""
        return f"the first stage of growth.kind={self.name} is longer than the budget; shorten it or raise the budget"

    def fits(self, epoch: int) -> str | None:
        """Return what to lower if batches exceed the `epoch` samples of the training set; None: start or cap."""
        return None

    # ── the batch ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def last_stage(self) -> float:
        """Return the last stage that changes anything, or inf if there is none."""
        return math.inf

    def stage_batch(self, stage: int) -> int:
        """Return the target batch of a stage, samples."""
        return self.start

    @property
    def first_batch(self) -> int:
        """Return the batch that the optimizer's settings are those of, samples."""
        return self.start

    def growth_steps(self, stage: int) -> float:
        """Return the growth steps made by `stage`. They are fractional if the cap cut the last one short."""
        return float(stage)

    def for_run(self, span: Span) -> "GrowthPolicy":
        """Return the policy with every setting that follows from the training set and the budget."""
        return self

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        """Return where stages end. Raise ConfigError if the settings do not go with the policy."""
        if stages.power:
            raise ConfigError(f"stages.power={stages.power} needs a growth factor; use growth.kind: exponential")
        return stages.trigger(1.0, span.epoch)

    def after(self, progress: Progress, plan: Plan, outcome: Outcome) -> PolicyState:
        """Return the policy's state after an update that began at `progress`."""
        return progress.policy

    # ── the learning rate ───────────────────────────────────────────────────────────────────────────────────────

    def rule(self, lr: LR) -> Rule:
        """Return how the learning rate follows the batch: `lr.rule`, or the policy's default."""
        return lr.rule if lr.rule is not None else self.default_rule

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        """Return η/η₀ of an update of `batch` samples: the rule's multiplier times the decay's."""
        grown = self.grown(progress.stage, batch)
        samples = progress.ledger.applied
        return self.rule(lr)(grown) * lr.decay.warm(samples, batch, span) * lr.decay.fall(samples, span)

    def rate_growth(self, lr: LR, progress: Progress, batch: int) -> float:
        """Return ρ, the part of η/η₀ by which η follows the batch; the rest is warm-up and decay."""
        return self.rule(lr)(self.grown(progress.stage, batch))

    def highest_rate(self, lr: LR, stage: int, rate: float) -> float:
        """Return the upper bound of the learning rate at `stage`, whose planned value is `rate`."""
        return rate

    def grown(self, stage: int, batch: int) -> Grown:
        """Return how far `batch`, which may be a shortened last one, has grown at `stage`."""
        return Grown(ratio=min(batch, self.stage_batch(stage)) / self.start, steps=self.growth_steps(stage))

    def remarks(self) -> Sequence[str]:
        """Return the lines that `plan` shows below the table."""
        return ()


def with_rule(growth: GrowthPolicy, lr: LR, rule: Rule | None) -> LR:
    """Return the learning rate with an optimizer's own `rule`, if neither `lr` nor the policy says how it grows."""
    said = lr.rule is not None or growth.brings_rule or growth.default_rule != GrowthPolicy.default_rule
    return lr if said or rule is None else lr.model_copy(update={"rule": rule})


def check_settings(growth: GrowthPolicy, stages: Stages, lr: LR, span: Span) -> None:
    """Check what every policy asks of the other settings.

    Raises:
        ConfigError: A setting does not go with the policy.
    """
    assert lr.initial > 0  # ConfigError if it is still to be measured
    if growth.sets_stages and stages != Stages():
        raise ConfigError(f"growth.kind={growth.name} sets its own stage lengths: remove stages")
    if growth.brings_rule and lr.rule is not None:
        raise ConfigError(f"{growth.name} growth brings its own LR rule: remove lr.rule")
    if growth.adaptive and not isinstance(lr.decay, NoDecay):
        needs_samples(f"growth.kind={growth.name} beside lr.decay", span)


def needs_samples(what: str, span: Span) -> None:
    """Raise ConfigError if the budget has no end on the samples axis, which `what` needs."""
    if not span.samples:
        raise ConfigError(
            f"{what} goes by the samples axis, where budget.steps has no end: "
            "give budget.epochs, budget.samples or budget.sfo, or choose another growth.kind"
        )


class Capped(GrowthPolicy):
    """Growth that stops at `cap`."""

    cap: PosInt | None = None
    """Largest global batch; none: it grows for as long as the budget lasts, which some kinds refuse."""

    @model_validator(mode="after")
    def _start_below_cap(self) -> "Capped":
        if self.cap is not None and self.start > self.cap:
            raise ConfigError(f"start={self.start} is above cap={self.cap}; lower start or raise cap")
        return self


class Geometrical(Capped):
    """Growth by the same factor at each stage: b₀·δ^m."""

    factor: Annotated[float, Field(gt=1, le=1e6)] = 2.0
    """δ, the batch's factor at each stage; above 1."""

    @property
    def last_stage(self) -> float:
        return self.cap_stage

    @cached_property
    def cap_stage(self) -> float:
        """Return the first stage at which the batch, rounded up, is the cap."""
        if self.cap is None:
            return math.inf
        stage = max(0, math.ceil(self._steps_to(max(self.start, self.cap - 1))) - 1)
        while self._uncapped(stage) < self.cap:
            stage += 1
        return stage

    def stage_batch(self, stage: int) -> int:
        batch = self._uncapped(stage)
        return batch if self.cap is None else min(batch, self.cap)

    def growth_steps(self, stage: int) -> float:
        return min(float(stage), self.cap_stage, self._steps_to(self.cap or math.inf))

    def needs_cap(self, why: str) -> int:
        """Return the cap. Raise ConfigError if there is none."""
        if self.cap is None:
            raise ConfigError(f"growth.kind={self.name} {why}: set growth.cap")
        return self.cap

    def _uncapped(self, stage: int) -> int:
        try:
            return at_least(self.start * self.factor**stage)
        except OverflowError:
            return sys.maxsize

    def _steps_to(self, batch: float) -> float:
        """Return log_δ(batch/b₀)."""
        return math.log(batch / self.start) / math.log(self.factor)
