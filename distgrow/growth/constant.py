"""The same batch throughout."""

from typing import Literal

from distgrow.growth.base import GrowthPolicy


class Constant(GrowthPolicy):
    """b₀ throughout."""

    kind: Literal["constant"] = "constant"

    @property
    def top(self) -> float:
        return 0
