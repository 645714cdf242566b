"""RMSprop."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from distgrow.core.spec import PosFloat
from distgrow.optim.base import OptimizerSpec
from distgrow.optim.groups import Group

if TYPE_CHECKING:
    import torch


class RMSprop(OptimizerSpec):
    """torch.optim.RMSprop."""

    l2: ClassVar[bool] = True
    undamped: ClassVar[bool] = True

    kind: Literal["rmsprop"] = "rmsprop"
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the mean square."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum."""
    centered: bool = False
    """Divide by the standard deviation in place of the root mean square."""
    eps: PosFloat = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty."""

    @property
    def state_copies(self) -> int:
        """See OptimizerSpec."""
        return 1 + int(self.momentum > 0) + int(self.centered)

    def build(self, groups: list[Group]) -> "torch.optim.Optimizer":
        """See OptimizerSpec."""
        import torch

        return torch.optim.RMSprop(
            groups,
            lr=0.0,
            alpha=self.alpha,
            momentum=self.momentum,
            centered=self.centered,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
