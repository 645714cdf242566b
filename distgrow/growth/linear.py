"""The batch grows by the same number of samples at each stage."""

import math
from typing import Literal

from distgrow.core.spec import PosInt, by_position
from distgrow.growth.base import Capped


class Linear(Capped):
    """b₀ + c·m."""

    kind: Literal["linear"] = "linear"
    increment: PosInt = 16
    """c, samples added at each stage."""

    @property
    def last_stage(self) -> float:
        return math.inf if self.cap is None else -(-(self.cap - self.start) // self.increment)

    def stage_batch(self, stage: int) -> int:
        batch = self.start + self.increment * stage
        return batch if self.cap is None else min(batch, self.cap)

    def growth_steps(self, stage: int) -> float:
        return float(stage) if self.cap is None else min(stage, (self.cap - self.start) / self.increment)


linear = by_position(Linear, "start", "increment", "cap")
