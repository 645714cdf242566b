"""AdamW."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from distgrow.core.spec import PosFloat
from distgrow.optim.base import OptimizerSpec, fused
from distgrow.optim.groups import Group

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distgrow.optim.direction import Direction, Preconditioner


class AdamW(OptimizerSpec):
    """torch.optim.AdamW."""

    adam_moments: ClassVar[bool] = True
    skips_on_device: ClassVar[bool] = True

    kind: Literal["adamw"] = "adamw"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    eps: PosFloat = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay; it is no part of the objective."""

    @property
    def state_copies(self) -> int:
        """See OptimizerSpec."""
        return 2

    def build(self, groups: list[Group]) -> "torch.optim.Optimizer":
        """See OptimizerSpec."""
        import torch

        return torch.optim.AdamW(groups, lr=0.0, **self._settings(), fused=fused(groups))

    def fused_adamw(self) -> dict[str, object]:
        """See OptimizerSpec."""
        return self._settings()

    def direction(self) -> "Direction":
        """Return m̂/(√v̂ + ε); the decoupled decay is no part of it."""
        from distgrow.optim.direction import FromState

        return FromState("exp_avg", _last)

    def preconditioner(self) -> "Preconditioner":
        """Return 1/(√v̂ + ε), and 0 for what has had no gradient yet: its next one would outweigh all others."""
        return _scales

    def _settings(self) -> dict[str, Any]:
        return {"betas": (self.beta1, self.beta2), "eps": self.eps, "weight_decay": self.weight_decay}


def _last(states: Sequence[dict[str, Any]], group: dict[str, Any]) -> "Iterator[Tensor]":
    import torch

    from distgrow.optim.direction import real

    beta1, _ = group["betas"]
    for state, root in zip(states, _roots(states, group), strict=True):
        yield torch.div(real(state["exp_avg"]), root, out=root).div_(1 - beta1 ** _steps(state, group))


def _scales(states: Sequence[dict[str, Any]], group: dict[str, Any]) -> "Iterator[Tensor]":
    from distgrow.optim.direction import real

    for state, root in zip(states, _roots(states, group), strict=True):
        yield root.reciprocal_().mul_(real(state["exp_avg_sq"]) > 0)


def _roots(states: Sequence[dict[str, Any]], group: dict[str, Any]) -> "Iterator[Tensor]":
    """Yield √v̂ + ε, in new tensors."""
    from distgrow.optim.direction import real

    _, beta2 = group["betas"]
    for state in states:
        share = 1 - beta2 ** _steps(state, group)
        yield real(state["exp_avg_sq"]).sqrt().div_(share**0.5).add_(group["eps"])


def _steps(state: dict[str, Any], group: dict[str, Any]) -> "Tensor | float":
    """Return the steps that a parameter has taken; DeepSpeed's kernels count them in the group.

    A number that is on a device stays there, in double precision.
    """
    import torch

    steps: Any = state.get("step", group.get("step"))
    return steps.double() if isinstance(steps, torch.Tensor) else float(steps)
