"""Adadelta."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from distgrow.core.spec import PosFloat
from distgrow.optim.base import OptimizerSpec
from distgrow.optim.groups import Group

if TYPE_CHECKING:
    import torch


class Adadelta(OptimizerSpec):
    """torch.optim.Adadelta; its steps have the units of the parameters, so a learning rate of 1 is usual."""

    l2: ClassVar[bool] = True

    kind: Literal["adadelta"] = "adadelta"
    rho: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean squares."""
    eps: PosFloat = 1e-6
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty."""

    @property
    def state_copies(self) -> int:
        """See OptimizerSpec."""
        return 2

    def build(self, groups: list[Group]) -> "torch.optim.Optimizer":
        """See OptimizerSpec."""
        import torch

        return torch.optim.Adadelta(groups, lr=0.0, rho=self.rho, eps=self.eps, weight_decay=self.weight_decay)
