"""The default growth: b₀ for a while, then colder and colder until the budget is spent; a pure frozen spec."""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Rule, Span
from distgrow.core.lr import Constant as ConstantRule
from distgrow.core.progress import Progress
from distgrow.core.spec import PosFloat, PosInt, at_least, by_position
from distgrow.core.stages import Listed, Stages, Trigger
from distgrow.growth.adaptive import Endless
from distgrow.growth.base import Measure, Moment, needs_samples
from distgrow.growth.objective import Aimed
from distgrow.theory.last_iterate import share_at
from distgrow.theory.noise import removable_loss

Part = Annotated[float, Field(gt=0, lt=1)]


class Auto(Endless, Aimed):
    """b₀ and η, then colder to the end: along a line, or by equal stages once the loss has settled [D].

    A stage is a factor δ colder (η/b) than the one before: the batch grows by δ, and once it is at the cap η falls by δ
    instead. From `hold` of the budget on the temperature follows a straight line down to nothing at its end. Where the
    loss has settled it falls faster: what is left of the `depth` stages then shares what is left of the budget alike.
    It has when η·tr Σ/(4b), the loss that noise keeps up and an anneal removes, is at least `margin` times what the
    loss would still fall by over the rest of the budget at its present pace: measured at no gradient evaluations.
    """

    kind: Literal["auto"] = "auto"
    default_rule: ClassVar[Rule] = ConstantRule()
    old_keys: ClassVar[Mapping[str, str]] = {"sure": "later_confidence"}
    decay_power: ClassVar[float] = 1.0
    cap: PosInt | None = None
    """Largest global batch; none: a quarter of the training set, or an equal stage from `hold` on if that is less."""
    early: Part = 0.1
    """Part of the budget before which the loss is not taken to have settled."""
    hold: Part = 0.3
    """Part of the budget at which the temperature begins to fall along a line, whatever is measured."""
    margin: PosFloat = 0.5
    """How much removable loss has to outweigh the fall to come by."""
    depth: Annotated[int, Field(ge=1, le=100)] = 10
    """Stages of the anneal."""
    confidence: Annotated[float, Field(ge=0)] = 0.5
    """Standard errors that tr Σ is taken to be lower, and the fall of the loss to be steeper; 0: as measured."""
    later_confidence: Annotated[float, Field(ge=0)] = 3.0
    """`confidence` for later stages. They are short and tested at every update: a lower value would pass by chance."""
    updates: PosInt = 20
    """Updates whose loss the pace is judged by, at least."""

    @model_validator(mode="after")
    def _early_before_hold(self) -> "Auto":
        if self.early > self.hold:
            raise ConfigError(f"early={self.early:g} is after hold={self.hold:g}; lower early or raise hold")
        return self

    @property
    def needs(self) -> frozenset[Measure]:
        return frozenset({Measure.NOISE, Measure.LOSS})

    @property
    def last_stage(self) -> float:
        return self.depth

    def remarks(self) -> Sequence[str]:
        return ()  # its stages beyond the cap are shown

    def for_run(self, span: Span) -> "Auto":
        """Return the policy with a cap that suits the run, if none is given: the shortest stages are an update long."""
        if self.cap is not None:
            return self
        stage = int((1 - self.hold) * span.samples / self.depth)
        return Auto.model_validate({**self.model_dump(), "cap": max(self.start, min(span.epoch // 4, stage))})

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        super().trigger(stages, lr, span)
        needs_samples("growth.kind=auto", span)
        rest = (1 - self.hold) * span.samples
        if rest < self.depth:
            raise ConfigError(
                f"growth.kind=auto: {self.depth} stages in the last {rest:.3g} samples of the budget may have less "
                "than one each; raise budget, or lower growth.depth or growth.hold"
            )
        return Listed(axis="samples", ends=tuple(at_least(self.due(m) * span.samples) for m in range(self.depth)))

    def earliest(self, lr: LR, span: Span) -> Trigger:
        first = max(self.early, self.updates * self.start / span.samples)
        parts = (min(first + (1 - first) / self.depth * m, self.due(m)) for m in range(self.depth))
        return Listed(axis="samples", ends=tuple(at_least(part * span.samples) for part in parts))

    def due(self, stage: int) -> float:
        """Return the part of the budget at which a stage ends at the latest.

        It is where the line of `matched` growth at constant η is half-way, by ratio, to the next stage.
        """
        return share_at(self.factor ** -(stage + 0.5), self.hold)

    def stages_up(self, progress: Progress, now: Moment) -> int:
        stage, applied = progress.stage, progress.ledger.applied
        total, rest = applied + now.left, self.depth - stage
        passed = sum(self.due(m) * total <= applied for m in range(stage, self.depth))
        if passed or not rest:
            return passed
        if stage == 0:
            return int(applied >= self.early * total and self._settled(progress, now, self.confidence))
        each = (progress.stage_samples + now.left) / (rest + 1)  # what is left for this stage and each after it
        if progress.stage_samples < each:
            return 0
        if applied - progress.stage_samples < self.due(stage - 1) * total:  # it had settled before
            return min(rest, int(progress.stage_samples / each))
        return int(self._settled(progress, now, self.later_confidence))

    def _settled(self, progress: Progress, now: Moment, errors: float) -> bool:
        """Return whether an anneal gains more than going on would, by the cautious ends of both measurements."""
        variance, trend = progress.noise.variance.end(-errors), progress.noise.trend
        if trend.count < self.updates or not (variance > 0 and now.lr > 0):
            return False
        fall = (errors * trend.slope_error - trend.slope) * now.left
        return removable_loss(now.lr, variance, now.batch) >= self.margin * fall


auto = by_position(Auto, "start", "cap")
