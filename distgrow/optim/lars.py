"""LARS."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from distgrow.core.spec import PosFloat
from distgrow.optim.groups import Group
from distgrow.optim.layerwise import Layerwise

if TYPE_CHECKING:
    import torch


class LARS(Layerwise):
    """SGD with momentum whose step of each parameter has a length in proportion to the parameter's (You et al. 2017).

    Learning rates are much larger than SGD's: a step is the learning rate times `trust` of the parameter's norm.
    """

    l2: ClassVar[bool] = True
    undamped: ClassVar[bool] = True

    joins: ClassVar[bool] = True

    kind: Literal["lars"] = "lars"
    trust: PosFloat = 0.001
    """ϑ: a step's length at learning rate 1, as a share of the parameter's norm."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of the scaled gradients."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty. It is scaled with the gradient."""
    eps: Annotated[float, Field(ge=0)] = 1e-8
    """Added to the gradient's norm."""

    def build(self, groups: list[Group]) -> "torch.optim.Optimizer":
        """See OptimizerSpec."""
        from distgrow.optim import trust_ratio

        kept = {"trust", "momentum", "weight_decay", "eps", "max_ratio"}
        return trust_ratio.LARS(groups, **self.model_dump(include=kept))
