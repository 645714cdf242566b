"""NAdam."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from distgrow.core.spec import PosFloat
from distgrow.optim.base import OptimizerSpec, parameters_of
from distgrow.optim.groups import Group

if TYPE_CHECKING:
    import torch


class NAdam(OptimizerSpec):
    """torch.optim.NAdam: Adam with Nesterov's momentum."""

    l2: ClassVar[bool] = True

    kind: Literal["nadam"] = "nadam"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    momentum_decay: Annotated[float, Field(ge=0)] = 0.004
    """Decay of the momentum schedule."""
    eps: PosFloat = 1e-8
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

        optimizer = torch.optim.NAdam(
            groups,
            lr=0.0,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            momentum_decay=self.momentum_decay,
        )
        _load_products_as_they_are(optimizer)
        return optimizer


def _load_products_as_they_are(optimizer: "torch.optim.Optimizer") -> None:
    """Load the products of momenta in the precision that they have: torch would round them to the parameters'."""
    given: list[Any] = []

    def before(optimizer: "torch.optim.Optimizer", state: dict[str, Any]) -> None:
        keys = [key for group in state["param_groups"] for key in group["params"]]
        given[:] = [state["state"].get(key, {}).get("mu_product") for key in keys]

    def after(optimizer: "torch.optim.Optimizer") -> None:
        for parameter, product in zip(parameters_of(optimizer.param_groups), given, strict=True):
            if product is not None:
                optimizer.state[parameter]["mu_product"] = product.cpu().clone()
        given.clear()

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
