"""What growth policies share: the base class, caps, geometric growth, and growth by measurement."""

import math
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, NoDecay, Rule, Rung, Span, Sqrt
from distgrow.core.progress import Progress
from distgrow.core.spec import PosInt, Spec, at_least
from distgrow.core.stages import Listed, MinStage, Stages, Trigger


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Hold what an adaptive policy may know of the coming update beside the progress, if the stage stays."""

    lr: float
    batch: int
    epoch: int  #: samples of one pass over the training set
    left: float  #: samples that the budget still allows; inf where it is in steps
    settings: LR
    span: Span


class GrowthPolicy(Spec):
    """Share what all growth policies have. Subclasses give `__call__`, `top` and `height`."""

    sets_stages: ClassVar[bool] = False  #: whether it has no use for `stages`
    brings_rule: ClassVar[bool] = False  #: whether it has no use for `lr.rule`
    default_rule: ClassVar[Rule] = Sqrt()

    start: PosInt = 16
    """b₀, samples in the first stage's global batch."""

    @property
    def adaptive(self) -> bool:
        """Return whether measurements decide about stages, through `moves`."""
        return False

    @property
    def measures(self) -> bool:
        """Return whether the policy needs measured gradient noise."""
        return False

    @property
    def plain_sgd(self) -> bool:
        """Return whether the policy's rule holds for SGD without momentum alone."""
        return False

    @property
    def measures_within(self) -> float:
        """Return the updates within which noise has to be measured to be of use, or inf if it can wait."""
        return math.inf

    @property
    def tests_progress(self) -> bool:
        """Return whether the policy needs the product of gradients and updates."""
        return False

    @property
    def probes_norm(self) -> bool:
        """Return whether the policy needs exact measurements of ‖∇f‖."""
        return False

    @property
    def top(self) -> float:
        """Return the last stage that changes anything, or inf if there is none."""
        return math.inf

    def __call__(self, stage: int) -> int:
        """Return the target batch of a stage, samples."""
        return self.start

    def height(self, stage: int) -> float:
        """Return the growth steps made by `stage`. They are fractional if the cap cut the last one short."""
        return float(stage)

    @property
    def name(self) -> str:
        """Return the policy's `growth.kind`."""
        return type(self).model_fields["kind"].default

    def on(self, span: Span) -> "GrowthPolicy":
        """Return the policy with everything that depends on the training set and the budget."""
        return self

    # ── when it moves ───────────────────────────────────────────────────────────────────────────────────────────

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        """Return where the stages end. Raise ConfigError if the settings do not go with the policy."""
        if self.sets_stages and stages != Stages():
            raise ConfigError(f"growth.kind={self.name} sets its own stage lengths: remove stages")
        if self.brings_rule and lr.rule is not None:
            raise ConfigError(f"{self.name} growth brings its own LR rule: remove lr.rule")
        if self.adaptive and not isinstance(lr.decay, NoDecay):
            needs_samples(f"growth.kind={self.name} beside lr.decay", span)
        return self.boundaries(stages, lr, span)

    def boundaries(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        """Return where the stages end, for settings that `trigger` has checked."""
        if self.adaptive:
            return Listed(axis="samples", ends=())
        if stages.power:
            raise ConfigError(f"stages.power={stages.power} needs a growth factor; use growth.kind: exponential")
        return stages.trigger(1.0, span.epoch)

    def earliest(self, lr: LR, span: Span) -> Trigger:
        """Return where an adaptive policy's stages could end at the earliest, whatever is measured.

        There is no stage beyond the cap.
        """
        return Listed(axis="samples", ends=())

    def moves(self, progress: Progress, now: Moment) -> int:
        """Return the number of stages by which an adaptive policy goes up before the coming update; mostly 0."""
        return 0

    def cools(self, progress: Progress, now: Moment) -> int:
        """Return the steps by which the temperature falls before `moves` is asked; mostly 0."""
        return 0

    def probe_due(self, progress: Progress) -> bool:
        """Return whether ‖∇f‖ has to be measured exactly before the coming update."""
        return False

    def probes(self, updates: int, stage: int) -> int:
        """Return the number of exact measurements of ‖∇f‖ in a run of `updates` updates that ends at `stage`."""
        return 0

    # ── the learning rate ───────────────────────────────────────────────────────────────────────────────────────

    def rule(self, lr: LR) -> Rule:
        """Return how the learning rate follows the batch: `lr.rule`, or the policy's default."""
        return lr.rule if lr.rule is not None else self.default_rule

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        """Return η/η₀ of an update of `batch` samples: the rule's multiplier times the decay's."""
        rung = self.rung(progress.stage, batch)
        samples = progress.ledger.applied
        return self.rule(lr)(rung) * lr.decay.warm(samples, batch, span) * lr.decay.fall(samples, span)

    def most(self, lr: LR, stage: int, rate: float) -> float:
        """Return the upper bound of the learning rate at `stage`, whose planned value is `rate`."""
        return rate

    def rung(self, stage: int, batch: int) -> Rung:
        """Return the place of `stage` for a batch that may be a shortened last one."""
        return Rung(ratio=min(batch, self(stage)) / self.start, height=self.height(stage))

    def worth(self, progress: Progress, batch: int, span: Span) -> float:
        """Return how many samples at b₀ an update of `batch` samples counts for; 0 if the policy counts none."""
        return 0.0

    def remarks(self) -> list[str]:
        """Return the lines that `plan` shows below the table."""
        return []


class Capped(GrowthPolicy):
    """A ladder that stops at `cap`."""

    cap: PosInt | None = None
    """Largest global batch; none: it grows for as long as the budget lasts, which some kinds refuse."""

    @model_validator(mode="after")
    def _start_below_cap(self) -> "Capped":
        if self.cap is not None and self.start > self.cap:
            raise ConfigError(f"start={self.start} is above cap={self.cap}; lower start or raise cap")
        return self


class Geometrical(Capped):
    """What the ladders b₀·δ^m share."""

    factor: Annotated[float, Field(gt=1, le=1e6)] = 2.0
    """δ, the batch's factor at each stage; above 1."""

    @property
    def top(self) -> float:
        return self.cap_stage

    @cached_property
    def cap_stage(self) -> float:
        """Return the first stage at which the batch, rounded up, is the cap."""
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
        """Return the cap. Raise ConfigError if there is none."""
        if self.cap is None:
            raise ConfigError(f"growth.kind={self.name} {why}: set growth.cap")
        return self.cap

    def _uncapped(self, stage: int) -> int:
        try:
            return at_least(self.start * self.factor**stage)
        except OverflowError:
            return sys.maxsize

    def _height_of(self, batch: float) -> float:
        """Return log_δ(batch/b₀)."""
        return math.log(batch / self.start) / math.log(self.factor)


def needs_samples(what: str, span: Span) -> None:
    """Raise ConfigError if the budget has no end on the samples axis, which `what` needs."""
    if not span.samples:
        raise ConfigError(
            f"{what} goes by the samples axis, where budget.steps has no end: "
            "give budget.epochs, budget.samples or budget.sfo, or choose another growth.kind"
        )


class Adaptive(Geometrical):
    """A ladder b₀·δ^m up to a cap that measurements move; it only ever climbs."""

    sets_stages: ClassVar[bool] = True

    @property
    def adaptive(self) -> bool:
        return True

    def boundaries(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        self.needs_cap("could grow without end")
        return super().boundaries(stages, lr, span)

    def soonest(self, dwell: MinStage, span: Span, rungs: int = 1) -> Trigger:
        """Where stages can end at the soonest if every move climbs up to `rungs` and waits for `dwell`.

        A move of fewer rungs may get to a stage sooner, as `dwell` lasts fewer samples where batches are small.
        """
        begins = [0]
        for stage in range(1, int(self.cap_stage) + 1):
            below = range(stage - rungs, stage) if stage > rungs else (0,)  # none is left before stage 0 is
            begins.append(min(begins[m] + dwell.least(self(m), span.epoch) for m in below))
        return Listed(axis="samples", ends=tuple(begins[1:]))


class Endless(Adaptive):
    """An adaptive ladder whose stages go on beyond the cap, where the learning rate decays instead."""

    decay_power: ClassVar[float]  #: η falls by δ^power for each δ that the batch could not grow by

    @property
    def top(self) -> float:
        """Return the last stage: a learning rate below 1e-12 of the cap's moves nothing any more."""
        return self.cap_stage + math.ceil(12 / (self.decay_power * math.log10(self.factor)))

    def remarks(self) -> list[str]:
        fall = self.factor**-self.decay_power
        return [f"at the cap lr falls to {fall:.3g} of itself wherever the batch would have grown, which is not shown"]

    def shortfall(self, stage: int) -> float:
        """Return η's multiplier for the growth that the cap prevented: (cap/(b₀δ^m))^power, 1 below the cap."""
        return self.factor ** (self.decay_power * (self.height(stage) - stage))

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        return super().multiplier(lr, progress, batch, span) * self.shortfall(progress.stage)
