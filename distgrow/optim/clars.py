"""CLARS."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from distgrow.core.lr import Linear, Rule
from distgrow.core.spec import PosFloat
from distgrow.optim.groups import Group
from distgrow.optim.layerwise import Layerwise

if TYPE_CHECKING:
    import torch


class CLARS(Layerwise):
    """LARS by the norms of single samples' gradients in place of the mean gradient's (Gao and Huang 2020).

    Their root mean square is estimated from micro-batches at no further gradient evaluations. So the length of a step
    does not depend on the batch, and the learning rate grows with it as SGD's does.
    """

    scaling: ClassVar[Literal["linear", "sqrt"]] = "linear"
    growth_rule: ClassVar[Rule | None] = Linear()
    l2: ClassVar[bool] = True
    undamped: ClassVar[bool] = True
    goes_by_parts: ClassVar[bool] = True

    kind: Literal["clars"] = "clars"
    trust: PosFloat = 0.01
    """ϑ: at learning rate 1, a step's length over the parameter's norm if all samples had the same gradient."""
    max_ratio: PosFloat | None = 0.1
    """Largest trust ratio; none: no limit."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of the gradients, which are scaled after it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty. It is scaled with the gradient."""
    eps: Annotated[float, Field(ge=0)] = 1e-8
    """Added to the gradients' norm."""

    def build(self, groups: list[Group]) -> "torch.optim.Optimizer":
        """See OptimizerSpec."""
        from distgrow.optim import trust_ratio

        kept = {"trust", "momentum", "weight_decay", "eps", "max_ratio"}
        return trust_ratio.CLARS(groups, **self.model_dump(include=kept))
