"""Growth when successive updates undo each other (Pflug 1983)."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distgrow.core.lr import LR, Rule, Span
from distgrow.core.lr import Constant as ConstantRule
from distgrow.core.progress import Progress
from distgrow.core.spec import PosFloat, by_position
from distgrow.core.stages import MinStage, Trigger
from distgrow.growth.adaptive import Endless
from distgrow.growth.base import Measure, Moment


class ProgressTest(Endless):
    """One stage up when updates undo each other: when the mean of ⟨g_{t+1}, u_t⟩ since the last change is ≤ 0 [D].

    After Pflug 1983; u_t is the direction of the update before. At the cap η is divided by δ instead. η is constant
    below it unless lr.rule says else.
    """

    kind: Literal["progress_test"] = "progress_test"
    old_kinds: ClassVar[tuple[str, ...]] = ("progress",)
    old_keys: ClassVar[Mapping[str, str]] = {"dwell": "min_stage"}
    default_rule: ClassVar[Rule] = ConstantRule()
    decay_power: ClassVar[float] = 1.0
    min_stage: MinStage = MinStage(epochs=1.0)
    """How long a stage is at least, and how many updates it is judged by."""
    confidence: Annotated[float, Field(ge=0)] = 0.0
    """Standard errors that the mean has to be below 0 by."""
    early: PosFloat | None = None
    """Standard errors below 0 at which a stage need not be as long as `min_stage`; none: it always is."""

    @property
    def needs(self) -> frozenset[Measure]:
        return frozenset({Measure.PROGRESS})

    def earliest(self, lr: LR, span: Span) -> Trigger:
        return self.earliest_ends(
            self.min_stage if self.early is None else MinStage(updates=self.min_stage.updates), span
        )

    def stages_up(self, progress: Progress, now: Moment) -> int:
        product, min_stage = progress.noise.product, self.min_stage
        if progress.stage >= self.last_stage or product.count < min_stage.updates:
            return 0
        errors = self.confidence if progress.stage_samples >= min_stage.length(now.epoch) else self.early
        return int(errors is not None and product.end(errors) <= 0)


progress_test = by_position(ProgressTest, "start", "cap", "factor")
