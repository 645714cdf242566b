"""Every optimizer of the union that flat shards can have, and more settings of some."""

from typing import get_args

from distgrow.core.optimizer_plan import AtGrowth
from distgrow.optim import Optimizer, OptimizerSpec
from distgrow.optim.adamw import AdamW
from distgrow.optim.groups import ParameterGroup
from distgrow.optim.rmsprop import RMSprop
from distgrow.optim.sgd import SGD


def union() -> list[type[OptimizerSpec]]:
    """All optimizers that a config can name."""
    return [spec for spec in get_args(get_args(Optimizer)[0]) if not spec.model_fields.get("target")]


#: All that can follow the batch.
GROWING = AtGrowth(beta2="samples", momentum="samples", weight_decay="samples", moments="reset")
#: By name; each member of the union, a new one too, with its gradients clipped. Roundings of gradients near 0 would
#: turn a step of a small eps about.
OPTIMIZERS: dict[str, OptimizerSpec] = {
    **{spec().name: spec(clip=0.5) for spec in union() if not spec().sharded_fault()},
    "sgd, all": SGD(momentum=0.9, nesterov=True, weight_decay=0.1, clip=0.5),
    "rmsprop": RMSprop(clip=0.5, eps=1e-3),
    "rmsprop, all": RMSprop(momentum=0.5, centered=True, weight_decay=0.1, clip=0.5, eps=1e-2),
    "sgd, groups": SGD(
        weight_decay=0.1, no_decay=True, groups=[ParameterGroup(match="3", ndim=2, lr_scale=0.3, weight_decay=0.02)]
    ),
    "sgd, at growth": SGD(momentum=0.9, clip=0.5, at_growth=AtGrowth(momentum="samples", moments="reset")),
    "adamw, at growth": AdamW(beta2=0.98, weight_decay=0.3, eps=1e-3, no_decay=True, at_growth=GROWING),
    "adamw, groups": AdamW(no_decay=True, groups=[ParameterGroup(match="3", ndim=2, lr_scale=0.3)]),
}

#: The engine under which an optimizer is resumed; sgd and adamw have tests of their own.
RESUMED = {"rmsprop": "zero 1", "adadelta": "zero 2", "nadam": "zero 3", "adamw, at growth": "zero 3"}
