"""The default growth: b₀ for as long as that pays, then an anneal until the budget is spent; a pure frozen spec."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.adaptive import Endless
from distgrow.ladders import Moment, needs_samples
from distgrow.lr import LR, Rule, Span
from distgrow.lr import Constant as ConstantRule
from distgrow.noise_theory import removable_loss
from distgrow.progress import Progress
from distgrow.spec import ConfigError, PosFloat, PosInt, at_least
from distgrow.stages import Listed, Stages, Trigger

Part = Annotated[float, Field(gt=0, lt=1)]


class Auto(Endless):
    """b₀ and η until the noise that they keep in the loss outweighs what they still gain, then colder to the end [D].

    The anneal is `depth` stages of equal length, each a factor δ colder than the one before: the batch grows by δ, and
    once it is at the cap η falls by δ instead. It begins when η·tr Σ/(4b), the loss that noise keeps up and an anneal
    removes, is at least `margin` times what the loss would still fall by over the rest of the budget at its present
    pace; at `hold` of the budget at the latest. tr Σ and the pace are measured at no gradient evaluations.
    """

    kind: Literal["auto"] = "auto"
    default_rule: ClassVar[Rule] = ConstantRule()
    decay_power: ClassVar[float] = 1.0
    cap: PosInt | None = None
    """Largest global batch; none: a quarter of the training set, or less where stages from `hold` on are shorter."""
    early: Part = 0.1
    """Part of the budget before which the anneal does not begin."""
    hold: Part = 0.75
    """Part of the budget at which it begins whatever is measured."""
    margin: PosFloat = 0.5
    """How much removable loss has to outweigh the fall to come by."""
    depth: Annotated[int, Field(ge=1, le=100)] = 10
    """Stages of the anneal."""
    confidence: Annotated[float, Field(ge=0)] = 0.5
    """Standard errors that tr Σ is taken to be lower, and the fall of the loss to be steeper; 0: as measured."""
    updates: PosInt = 20
    """Updates whose loss the pace is judged by, at least."""

    @model_validator(mode="after")
    def _early_before_hold(self) -> "Auto":
        if self.early > self.hold:
            raise ConfigError(f"early={self.early:g} is after hold={self.hold:g}; lower early or raise hold")
        return self

    @property
    def measures(self) -> bool:
        return True

    @property
    def top(self) -> float:
        return self.depth

    def on(self, span: Span) -> "Auto":
        """With the cap that suits a run, where none is given: the shortest stages are still an update long."""
        if self.cap is not None:
            return self
        stage = int((1 - self.hold) * span.samples / self.depth)
        return Auto.model_validate({**self.model_dump(), "cap": max(self.start, min(span.epoch // 4, stage))})

    def boundaries(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        super().boundaries(stages, lr, span)
        needs_samples("growth.kind=auto", span)
        rest = (1 - self.hold) * span.samples
        if rest < self.depth:
            raise ConfigError(
                f"growth.kind=auto: {self.depth} stages in the last {rest:.3g} samples of the budget would have less "
                "than one each; raise budget, or lower growth.depth or growth.hold"
            )
        return self._anneal(self.hold * span.samples, span)

    def earliest(self, lr: LR, span: Span) -> Trigger:
        first = max(self.early * span.samples, self.updates * self.start)
        return self._anneal(min(first, self.hold * span.samples), span)

    def moves(self, progress: Progress, now: Moment) -> int:
        rest, applied = self.depth - progress.stage, progress.ledger.applied
        if progress.stage == 0:
            return int(applied >= self.hold * (applied + now.left) or self._pays(progress, now))
        each = (progress.stage_samples + now.left) / (rest + 1)  # what is left for this stage and each after it
        return min(rest, int(progress.stage_samples / each)) if rest else 0

    def _pays(self, progress: Progress, now: Moment) -> bool:
        """Whether an anneal gains more than going on as before would, by the ends of what is measured against it."""
        applied, trend = progress.ledger.applied, progress.noise.trend
        variance = progress.noise.variance.end(-self.confidence)
        if applied < self.early * (applied + now.left) or trend.count < self.updates:
            return False
        if not (variance > 0 and now.lr > 0):
            return False
        fall = (self.confidence * trend.slope_error - trend.slope) * now.left
        return removable_loss(now.lr, variance, now.batch) >= self.margin * fall

    def _anneal(self, first: float, span: Span) -> Trigger:
        """Where stages end if the anneal begins at `first`, samples."""
        each = (span.samples - first) / self.depth
        return Listed(axis="samples", ends=tuple(at_least(first + each * m) for m in range(self.depth)))
