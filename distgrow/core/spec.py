"""Spec: the frozen, strictly typed base of everything in a config. The docstrings of its fields are the manual."""

import math
from functools import cache
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from distgrow.core.errors import ConfigError


class Spec(BaseModel):
    """Hold frozen values. Unknown keys, wrong types and non-finite numbers are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, values: Any) -> Any:
        """Take 1e6 for 1000000 where a key wants an integer."""
        if not isinstance(values, dict) or float not in map(type, values.values()):
            return values
        whole = _integers(cls)
        return {
            key: int(value) if key in whole and type(value) is float and value.is_integer() else value
            for key, value in values.items()
        }


@cache
def _integers(spec: type[Spec]) -> frozenset[str]:
    """Return the keys that take integers, but no other numbers."""
    kinds = {name: _types(field.annotation) for name, field in spec.model_fields.items()}
    return frozenset(name for name, found in kinds.items() if int in found and float not in found)


def _types(annotation: Any) -> set[Any]:
    """Return the plain types in an annotation; those inside of collections are not among them."""
    if getattr(annotation, "__origin__", None) in (list, dict, tuple, set):
        return set()
    return {annotation}.union(
        *(_types(inner) for inner in get_args(annotation) if isinstance(inner, type) or get_args(inner))
    )


PosInt = Annotated[int, Field(ge=1)]

PosFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Fraction = Annotated[float, Field(ge=0, le=1)]


def default_kind(kind: str) -> BeforeValidator:
    """Take settings without a kind for those of `kind`."""
    return BeforeValidator(lambda given: {"kind": kind, **given} if isinstance(given, dict) else given)


def one_of(spec: Spec, *units: str) -> str:
    """Return the one field of `units` that is given. Raise ConfigError if none or several are."""
    given = [unit for unit in units if getattr(spec, unit) is not None]
    if len(given) != 1:
        hint = f"; an override that reads {{{given[-1]}: …}} replaces the others" if given else ""
        raise ConfigError(f"give exactly one of {', '.join(units)}; got {' and '.join(given) or 'none'}{hint}")
    return given[0]


def at_least(value: float) -> int:
    """Return the smallest integer that is not below `value`, forgiving float round-off (10 · 1.1 is 11, not 12)."""
    if isinstance(value, int):
        return value
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else math.ceil(value)
