"""Parameter groups: which parameters have a learning rate or a weight decay of their own."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.spec import Spec

if TYPE_CHECKING:
    from torch import nn

#: A parameter group as torch's optimizers take it: `params`, and the settings that are the group's own.
Group = dict[str, Any]
#: The settings that a group can have of its own.
OWN = ("lr_scale", "weight_decay")


class Parameters(Spec):
    """Some of a model's parameters, by name or number of dimensions. If both are given, both must match."""

    match: str | None = None
    """Regular expression that is searched for in the parameter's name: "bias|norm", "^head"."""
    ndim: Annotated[int, Field(ge=0)] | None = None
    """Number of dimensions: 1 for biases and the weights of norms."""

    @field_validator("match")
    @classmethod
    def _is_an_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ConfigError(f"match={value!r} is no regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _matches_something(self) -> Self:
        if self.match is None and self.ndim is None:
            raise ConfigError("a group needs match or ndim, which say what parameters it has")
        return self

    def has(self, name: str, parameter: "nn.Parameter") -> bool:
        """Return whether a parameter matches."""
        by_name = self.match is None or re.search(self.match, name) is not None
        return by_name and (self.ndim is None or parameter.dim() == self.ndim)

    def label(self) -> str:
        """Return what the group is known by."""
        asked = {"match": self.match, "ndim": self.ndim}
        return ", ".join(f"{key}={value!r}" for key, value in asked.items() if value is not None)


class ParameterGroup(Parameters):
    """Parameters that train differently. A parameter belongs to the first group that it matches."""

    lr_scale: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay. Default: the optimizer's."""

    def own(self) -> dict[str, float]:
        """Return the settings that differ from the optimizer's."""
        scale = {} if self.lr_scale == 1 else {"lr_scale": self.lr_scale}
        return scale if self.weight_decay is None else {**scale, "weight_decay": self.weight_decay}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped:
    """Hold one group of a model's parameters."""

    label: str  #: what put them there, for messages
    names: list[str]
    parameters: "list[nn.Parameter]"
    own: Mapping[str, float]  #: settings of the group's own: some of OWN, and what its optimizer alone knows

    def shown(self) -> str:
        """Return a line that says what the group has."""
        numbers = sum(math.prod(parameter.shape) for parameter in self.parameters)
        own = "".join(f", {name} {value:g}" for name, value in self.own.items() if name in OWN)
        return f"parameters of {self.label}: {len(self.names)}, {numbers:,} numbers{own}"

    def for_torch(self) -> Group:
        """Return the group as torch's optimizers take it."""
        return {"params": self.parameters, **self.own}

    def parted(self, told: Callable[[str, "nn.Parameter"], bool]) -> "tuple[Grouped | None, Grouped | None]":
        """Return the group's parameters that are told apart, by name and value, and the others. None: no such."""
        sides: list[dict[str, nn.Parameter]] = [{}, {}]
        for name, parameter in zip(self.names, self.parameters, strict=True):
            sides[not told(name, parameter)][name] = parameter
        apart, others = (
            replace(self, names=list(side), parameters=list(side.values())) if side else None for side in sides
        )
        return apart, others


def grouped(named: "Mapping[str, nn.Parameter]", groups: Sequence[ParameterGroup], *, no_decay: bool) -> list[Grouped]:
    """Sort parameters into groups: the given ones, those without weight decay, and the rest. None is empty.

    Args:
        named: The parameters by name.
        groups: The groups that a config asks for, in order.
        no_decay: Whether parameters of less than two dimensions that are in no other group have no weight decay.

    Raises:
        ConfigError: A group has no parameter.
    """
    rest, found = dict(named), list[Grouped]()
    for number, group in enumerate(groups):
        names = [name for name, parameter in rest.items() if group.has(name, parameter)]
        label = group.label()
        if not names:
            raise ConfigError(_nothing(f"optimizer.groups[{number}]: {label}", group, named))
        found.append(Grouped(label=label, names=names, parameters=[rest.pop(name) for name in names], own=group.own()))
    if no_decay and (names := [name for name, parameter in rest.items() if parameter.dim() < 2]):
        own = {"weight_decay": 0.0}
        found.append(Grouped(label="no_decay", names=names, parameters=[rest.pop(n) for n in names], own=own))
    if rest:
        found.append(Grouped(label="rest", names=list(rest), parameters=list(rest.values()), own={}))
    return found


def check_named(key: str, parts: Sequence[Parameters], named: "Mapping[str, nn.Parameter]") -> None:
    """Check that there are parameters of every name that a list asks for; a dimension may be of none.

    Raises:
        ConfigError: There is none of some name.
    """
    for number, part in enumerate(parts):
        if part.match is not None and not any(part.has(name, parameter) for name, parameter in named.items()):
            raise ConfigError(_nothing(f"{key}[{number}]: {part.label()}", part, named))


def _nothing(what: str, group: Parameters, named: "Mapping[str, nn.Parameter]") -> str:
    """Return why a group is empty: nothing matches, or an earlier group has all that does."""
    if any(group.has(name, parameter) for name, parameter in named.items()):
        return f"{what} meets only parameters that earlier groups have; move it before them, or remove it"
    shown = ", ".join(list(named)[:12]) + (" …" if len(named) > 12 else "")
    return f"{what} meets no parameter; their names are {shown}"


def assign_lr(groups: Iterable[Group], lr: float) -> None:
    """Set the learning rate of all parameter groups, times a group's own `lr_scale`."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
