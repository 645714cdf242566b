"""Adagrad."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from distgrow.core.spec import PosFloat
from distgrow.optim.base import OptimizerSpec
from distgrow.optim.groups import Group

if TYPE_CHECKING:
    import torch


class Adagrad(OptimizerSpec):
    """torch.optim.Adagrad."""

    l2: ClassVar[bool] = True

    kind: Literal["adagrad"] = "adagrad"
    eps: PosFloat = 1e-10
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty."""

    @property
    def state_copies(self) -> int:
        """See OptimizerSpec."""
        return 1

    def sharded_fault(self) -> str:
        """See OptimizerSpec; DeepSpeed rebuilds it without its groups, and ZeRO 3 cannot load its state."""
        return "begins its state with the whole parameters"

    def build(self, groups: list[Group]) -> "torch.optim.Optimizer":
        """See OptimizerSpec."""
        import torch

        return torch.optim.Adagrad(groups, lr=0.0, eps=self.eps, weight_decay=self.weight_decay)
