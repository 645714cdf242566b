"""SGD, with momentum and L2 penalty."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.optim.at_growth import NESTEROV_FAULT
from distgrow.optim.base import OptimizerSpec, fused
from distgrow.optim.groups import Group

if TYPE_CHECKING:
    import torch

    from distgrow.optim.direction import Direction


class SGD(OptimizerSpec):
    """torch.optim.SGD."""

    scaling: ClassVar[Literal["linear", "sqrt"]] = "linear"
    l2: ClassVar[bool] = True
    skips_on_device: ClassVar[bool] = True

    kind: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum; 0 is plain SGD, the paper's optimizer."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "SGD":
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov=true needs momentum above 0")
        return self

    @property
    def summary(self) -> str:
        """See OptimizerSpec."""
        return f"sgd with momentum={self.momentum:g}"

    @property
    def plain_sgd(self) -> bool:
        """See OptimizerSpec."""
        return self.momentum == 0

    @property
    def state_copies(self) -> int:
        """See OptimizerSpec."""
        return int(self.momentum > 0)

    def growth_fault(self, key: str) -> str | None:
        """See OptimizerSpec."""
        return NESTEROV_FAULT if key == "momentum" and self.nesterov else super().growth_fault(key)

    def build(self, groups: list[Group]) -> "torch.optim.Optimizer":
        """See OptimizerSpec."""
        import torch

        optimizer = torch.optim.SGD(
            groups,
            lr=0.0,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=fused(groups),
        )
        if self.momentum:
            optimizer.register_step_pre_hook(_begin_late)
        return optimizer

    def direction(self) -> "Direction":
        """Return the gradient that plain SGD took, or the momentum buffer; both include the penalty's λθ."""
        from distgrow.optim.direction import FromState, KeptGradient

        if self.momentum == 0:
            return KeptGradient()
        return FromState("momentum_buffer", lambda states, _: (state["momentum_buffer"] for state in states))


def _begin_late(optimizer: "torch.optim.Optimizer", *_: object) -> None:
    """Give parameters whose first gradient comes late the buffer that others have: torch's fused SGD fails without.

    A buffer of zeros becomes the gradient, as at a first step.
    """
    state = optimizer.state
    if not any("momentum_buffer" in kept for kept in state.values()):
        return  # the first step of all
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and state[parameter].get("momentum_buffer") is None:
                state[parameter]["momentum_buffer"] = parameter.detach().clone().zero_()
