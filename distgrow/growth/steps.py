"""An explicit list of batch sizes, one a stage."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Span
from distgrow.core.spec import PosInt, by_position
from distgrow.core.stages import Listed, Stages, Trigger
from distgrow.growth.base import GrowthPolicy


class Steps(GrowthPolicy):
    """An explicit list of batch sizes."""

    kind: Literal["steps"] = "steps"
    old_kinds: ClassVar[tuple[str, ...]] = ("list",)
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
    def last_stage(self) -> float:
        return len(self.batches) - 1

    def stage_batch(self, stage: int) -> int:
        return self.batches[min(stage, len(self.batches) - 1)]

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        trigger = super().trigger(stages, lr, span)
        if isinstance(trigger, Listed) and len(trigger.ends) not in (self.last_stage, self.last_stage + 1):
            raise ConfigError(
                f"growth.batches has {counted(len(self.batches), 'stage')}, stages.every gives {len(trigger.ends)}"
            )
        return trigger


steps = by_position(Steps, "batches", sizes="batches")
