"""What LARS, LAMB and CLARS share: steps scaled by a trust ratio, and the parameters that have none."""

from abc import ABC
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from distgrow.core.lr import Rule, Sqrt
from distgrow.core.spec import PosFloat
from distgrow.optim.base import OptimizerSpec
from distgrow.optim.groups import Grouped, Parameters, check_named

if TYPE_CHECKING:
    from torch import nn

#: A parameter group's own setting: whether its steps are scaled by trust ratios.
TRUSTED = "trusted"


class Layerwise(OptimizerSpec, ABC):
    """Hold the settings of an optimizer that scales the step of each parameter by its trust ratio."""

    per_tensor: ClassVar[bool] = True
    always_shown: ClassVar[bool] = True
    growth_rule: ClassVar[Rule | None] = Sqrt()  # a ratio over the norm of a mean gradient grows as √b itself

    exclude: list[Parameters] = [Parameters(ndim=0), Parameters(ndim=1)]
    """Parameters without trust ratio and without weight decay. Default: biases and the weights of norms."""
    max_ratio: PosFloat | None = None
    """Largest trust ratio; none: no limit."""

    def grouped(self, named: "Mapping[str, nn.Parameter]") -> list[Grouped]:
        """Return the parameters in their groups, those excluded apart.

        A weight decay that `groups` gives to excluded parameters stays.

        Raises:
            ConfigError: A group, or a name that is excluded, has no parameter.
        """
        check_named("optimizer.exclude", self.exclude, named)
        found: list[Grouped] = []
        for group in super().grouped(named):
            excluded, others = group.parted(lambda name, p: any(each.has(name, p) for each in self.exclude))
            if excluded is not None:
                own = {"weight_decay": 0.0, **group.own, TRUSTED: False}
                found.append(replace(excluded, label=f"{group.label}, without trust ratio", own=own))
            if others is not None:
                found.append(others)
        return found
