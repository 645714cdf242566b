"""The same batch throughout."""

from typing import Literal

from distgrow.growth.base import Ladder


class Constant(Ladder):
    """b₀ throughout."""

    kind: Literal["constant"] = "constant"

    @property
    def top(self) -> float:
        return 0
