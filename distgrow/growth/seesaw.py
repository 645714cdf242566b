"""Seesaw: where the decay would divide the learning rate by δ, it falls by √δ and the batch grows by δ."""

from typing import ClassVar, Literal

from distgrow.core.spec import by_position
from distgrow.growth.decay_driven import Replacing


class Seesaw(Replacing):
    """Where η would be divided by δ: η/√δ and b·δ (arXiv 2510.14717)."""

    kind: Literal["seesaw"] = "seesaw"
    power: ClassVar[float] = 0.5


seesaw = by_position(Seesaw, "start", "factor", "cap")
