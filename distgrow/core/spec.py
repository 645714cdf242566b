"""Spec: the frozen, strictly typed base of all that a config can say; the field docstrings are its manual."""

import math
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from distgrow.core.errors import ConfigError


class Spec(BaseModel):
    """A frozen value; unknown keys, wrong types and non-finite numbers are refused where it is built."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


PosInt = Annotated[int, Field(ge=1)]

PosFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Fraction = Annotated[float, Field(ge=0, le=1)]


def default_kind(kind: str) -> BeforeValidator:
    """Settings that name no kind are those of `kind`."""
    return BeforeValidator(lambda given: {"kind": kind, **given} if isinstance(given, dict) else given)


def one_of(spec: Spec, *units: str) -> str:
    """The one field of `units` that is given; ValueError where none or several are."""
    given = [unit for unit in units if getattr(spec, unit) is not None]
    if len(given) != 1:
        hint = f"; an override that reads {{{given[-1]}: …}} replaces the others" if given else ""
        raise ConfigError(f"give exactly one of {', '.join(units)}; got {' and '.join(given) or 'none'}{hint}")
    return given[0]


def at_least(value: float) -> int:
    """The smallest integer that is not below `value`, forgiving float round-off (10 · 1.1 is 11, not 12)."""
    if isinstance(value, int):
        return value
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else math.ceil(value)
