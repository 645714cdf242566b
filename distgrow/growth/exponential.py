"""The batch grows by the same factor at each stage."""

from typing import Literal

from distgrow.core.lr import LR, Span
from distgrow.core.spec import by_position
from distgrow.core.stages import Stages, Trigger
from distgrow.growth.objective import Aimed


class Exponential(Aimed):
    """min(cap, ⌈b₀·δ^m⌉)."""

    kind: Literal["exponential"] = "exponential"

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        return stages.trigger(self.factor**stages.power, span.epoch)


exponential = by_position(Exponential, "start", "factor", "cap")
