"""The check of what a script gives as a schedule: the type of each part, and what to write in place of it."""

from collections.abc import Mapping
from numbers import Integral, Real
from types import FunctionType
from typing import Any

from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR
from distgrow.core.stages import Stages
from distgrow.growth.base import GrowthPolicy

#: An argument's types, whether None is allowed, and how it is written.
Allowed = tuple[tuple[type, ...], bool, str]

GROWTH: Allowed = (
    (GrowthPolicy,),
    False,
    "a growth policy, such as exponential(start=8, factor=2) or batches([8, 16])",
)
BUDGET: Allowed = ((Budget,), False, "a budget, such as budget(epochs=4)")
STAGES: Allowed = ((Stages,), True, "stages, such as every(epochs=1)")
RATE: Allowed = ((LR,), True, 'a learning rate, such as sqrt_lr(0.1), constant_lr(0.1) or constant_lr("auto")')
#: Of a Controller, whose caller leaves out what may be left out.
_SCHEDULE: Mapping[str, Allowed] = {
    "growth": GROWTH,
    "budget": BUDGET,
    "stages": ((Stages,), False, STAGES[2]),
    "lr": ((LR,), False, "a learning rate, such as sqrt_lr(0.1) or constant_lr(0.1)"),
}


def check_types(given: Mapping[str, Any], allowed: Mapping[str, Allowed]) -> None:
    """Check the types of arguments.

    Raises:
        ConfigError: One has the wrong type; the message names it, what was given and what is allowed.
    """
    for name, value in given.items():
        types, optional, example = allowed[name]
        if not isinstance(value, types) and not (optional and value is None):
            raise ConfigError(f"{name}={shown(value)}: {_instead_of(value, types)}allowed is {example}")


def check_schedule(controller: Any) -> None:
    """Check the types of a Controller's parts and its numbers of samples, ranks and rows.

    Raises:
        ConfigError: One of them cannot be; the message names it, what was given and what is allowed.
    """
    check_types({name: getattr(controller, name) for name in _SCHEDULE}, _SCHEDULE)
    epoch = controller.epoch
    if not isinstance(epoch, Real) or epoch % 1 != 0:
        raise ConfigError(f"epoch={shown(epoch)}: allowed is the number of samples of the training set, len(data)")
    if epoch < 1:
        raise ConfigError(f"the training set has {epoch} samples; it needs at least 1")
    for name, what in (("world", "the number of ranks"), ("max_micro", "the largest number of rows of a micro-batch")):
        value = getattr(controller, name)
        if not isinstance(value, Integral) or value < 1:
            raise ConfigError(f"{name}={shown(value)}: allowed is {what}, at least 1")


def shown(value: Any) -> str:
    """Show a value by its type as well, on one line of at most 80 characters."""
    if isinstance(value, type):
        return f"{value.__name__} (a class)"
    if isinstance(value, FunctionType):
        return f"{value.__name__} (a function)"
    text, kind = " ".join(repr(value).split()), type(value).__name__
    article = "an" if kind[0] in "aeioAEIO" else "a"
    return f"{text if len(text) <= 80 else text[:79] + '…'} ({article} {kind})"


def _instead_of(value: Any, types: tuple[type, ...]) -> str:
    """Return what to write for a spec that was not called."""
    if isinstance(value, type) and issubclass(value, types):
        required = any(field.is_required() for field in getattr(value, "model_fields", {}).values())
        return f"call it, {value.__name__}({'…' if required else ''}); "
    if isinstance(value, FunctionType) and value.__module__.startswith("distgrow."):
        return f"call it, {value.__name__}(…); "
    return ""
