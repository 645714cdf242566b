"""Adafactor."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from distgrow.core.spec import PosFloat
from distgrow.optim.base import OptimizerSpec
from distgrow.optim.groups import Group

if TYPE_CHECKING:
    import torch


class Adafactor(OptimizerSpec):
    """torch.optim.Adafactor: second moments of matrices are kept as rows and columns."""

    per_tensor: ClassVar[bool] = True

    kind: Literal["adafactor"] = "adafactor"
    beta2_decay: Annotated[float, Field(lt=0)] = -0.8
    """The second moment's decay at step t is 1 − t^beta2_decay."""
    eps: PosFloat = 1e-3
    """Least root mean square of a parameter, by which its step is scaled."""
    d: Annotated[float, Field(ge=1)] = 1.0
    """Largest root mean square of a step before it is scaled."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; it is no part of the objective."""

    @property
    def state_copies(self) -> int:
        """See OptimizerSpec."""
        return 1

    def build(self, groups: list[Group]) -> "torch.optim.Optimizer":
        """See OptimizerSpec."""
        import torch

        return torch.optim.Adafactor(
            groups, lr=0.0, beta2_decay=self.beta2_decay, eps=(None, self.eps), d=self.d, weight_decay=self.weight_decay
        )
