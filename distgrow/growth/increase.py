"""Increase: where the decay would divide the learning rate by δ, the batch grows by δ instead."""

from typing import ClassVar, Literal

from distgrow.core.spec import by_position
from distgrow.growth.decay_driven import Replacing


class Increase(Replacing):
    """Where η would be divided by δ: b·δ instead (Smith et al. 2017, AdaBatch)."""

    kind: Literal["increase"] = "increase"
    power: ClassVar[float] = 1.0


increase = by_position(Increase, "start", "factor", "cap")
