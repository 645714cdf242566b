"""Every optimizer of the union, and two that only the tests have, each all that a new one takes."""

from typing import Any, ClassVar, Literal, get_args

import torch

from distgrow.optim import Optimizer, OptimizerSpec
from distgrow.optim.adamw import AdamW
from distgrow.optim.groups import Group, ParameterGroup
from distgrow.optim.sgd import SGD


class RMSprop(OptimizerSpec):
    """torch.optim.RMSprop; the direction of its steps is measured, as it tells no formula."""

    kind: Literal["rmsprop"] = "rmsprop"

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(groups, lr=0.0, eps=1e-3)


class Lars(OptimizerSpec):
    """A step as long as |θ| of each parameter says: none that flat shards can make."""

    per_tensor: ClassVar[bool] = True
    kind: Literal["lars"] = "lars"

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        return _Lars(groups, {"lr": 0.0})


class _Lars(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * (group["lr"] * p.norm() / p.grad.norm().clamp_min(1e-12)))


def union() -> list[type[OptimizerSpec]]:
    """All optimizers that a config can name."""
    return [spec for spec in get_args(get_args(Optimizer)[0]) if not spec.model_fields.get("target")]


#: By name; each member of the union, a new one too, with its gradients clipped.
OPTIMIZERS: dict[str, OptimizerSpec] = {
    **{spec().name: spec(clip=0.5) for spec in union()},
    "sgd, all": SGD(momentum=0.9, nesterov=True, weight_decay=0.1, clip=0.5),
    "rmsprop": RMSprop(clip=0.5),
    "sgd, groups": SGD(
        weight_decay=0.1, no_decay=True, groups=[ParameterGroup(match="3", ndim=2, lr_scale=0.3, weight_decay=0.02)]
    ),
    "adamw, groups": AdamW(no_decay=True, groups=[ParameterGroup(match="3", ndim=2, lr_scale=0.3)]),
}
