"""LAMB."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from distgrow.core.spec import PosFloat
from distgrow.optim.groups import Group
from distgrow.optim.layerwise import Layerwise

if TYPE_CHECKING:
    import torch


class LAMB(Layerwise):
    """Adam whose step of each parameter is as long as the learning rate times the parameter (You et al. 2019)."""

    joins: ClassVar[bool] = True

    kind: Literal["lamb"] = "lamb"
    clip: PosFloat | None = 1.0
    """Largest norm of the mean gradient; none: no clipping."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    eps: PosFloat = 1e-6
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Added to Adam's step before that is scaled; it is no part of the objective."""

    @property
    def state_copies(self) -> int:
        """See OptimizerSpec."""
        return 2

    def growth_fault(self, key: str) -> str | None:
        """See OptimizerSpec."""
        scaled = "its weight decay is scaled with the step, whose length is the learning rate's alone"
        return scaled if key == "weight_decay" else super().growth_fault(key)

    def build(self, groups: list[Group]) -> "torch.optim.Optimizer":
        """See OptimizerSpec."""
        from distgrow.optim import trust_ratio

        kept = self.model_dump(include={"eps", "weight_decay", "max_ratio"})
        return trust_ratio.LAMB(groups, betas=(self.beta1, self.beta2), **kept)
