"""The same batch throughout."""

from typing import Literal

from distgrow.core.spec import by_position
from distgrow.growth.base import GrowthPolicy


class Constant(GrowthPolicy):
    """b₀ throughout."""

    kind: Literal["constant"] = "constant"

    @property
    def last_stage(self) -> float:
        return 0


constant = by_position(Constant, "start", batch="start")
