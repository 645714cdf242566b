"""Spec: the frozen, strictly typed base of everything in a config. The docstrings of its fields are the manual."""

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.spec_errors import explain


class _ToldPlainly(type(BaseModel)):
    """Make a spec that is called with wrong values raise ConfigError, in the words of a config's errors."""

    if not TYPE_CHECKING:  # a checker would take it for the signature of every spec

        def __call__(cls, *values: Any, **settings: Any) -> Any:
            try:
                return super().__call__(*values, **settings)
            except ValidationError as error:
                told = "\n".join(explain(error, cls, settings))
            raise ConfigError(f"{cls.__name__}: {told}")


class Spec(BaseModel, metaclass=_ToldPlainly):
    """Hold frozen values. Unknown keys, wrong types and non-finite numbers are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    old_kinds: ClassVar[tuple[str, ...]] = ()  #: values of `kind` that earlier versions wrote; still read
    old_keys: ClassVar[Mapping[str, str]] = {}  #: keys that earlier versions wrote → today's; still read

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not (cls.old_kinds or cls.old_keys):
            return values
        if twice := [f"{old} and {new}" for old, new in cls.old_keys.items() if old in values and new in values]:
            raise ConfigError(f"{twice[0]} are the old and the new name of one key: remove the old one")
        kind = {"kind": cls.model_fields["kind"].default} if values.get("kind") in cls.old_kinds else {}
        return {**{cls.old_keys.get(key, key): value for key, value in values.items()}, **kind}

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, values: Any) -> Any:
        """Take 1e6 for 1000000 where a key wants an integer."""
        if not isinstance(values, dict) or float not in map(type, values.values()):
            return values
        whole = _integers(cls)  # pyright: ignore[reportArgumentType]  # classes can be hashed
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


S = TypeVar("S", bound=Spec)

PosInt = Annotated[int, Field(ge=1)]

PosFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Fraction = Annotated[float, Field(ge=0, le=1)]


def by_position(spec: type[S], *names: str, **old_names: str) -> Callable[..., S]:
    """Return a function that makes a `spec`, whose keys `names` can be given by position. All keys can be named.

    Args:
        spec: What the function makes.
        names: Keys in the order of their positions.
        old_names: Arguments that earlier versions had → the keys that they are today.
    """
    fields = {name: field for name, field in spec.model_fields.items() if name != "kind" and field.init is not False}

    def make(*values: Any, **settings: Any) -> S:
        if len(values) > len(names):
            raise TypeError(f"{spec.__name__} takes at most {len(names)} arguments by position, {', '.join(names)}")
        given = dict(zip(names, values, strict=False))
        settings = {old_names.get(name, name): value for name, value in settings.items()}
        if twice := given.keys() & settings.keys():
            raise TypeError(f"{spec.__name__} got {', '.join(sorted(twice))} twice")
        return spec(**given, **settings)

    make.__doc__ = spec.__doc__
    make.__name__ = make.__qualname__ = re.sub(r"\B(?=[A-Z])", "_", spec.__name__).lower()
    make.__signature__ = Signature(  # pyright: ignore[reportFunctionMemberAccess]  # what inspect and help() show
        [
            Parameter(
                name,
                Parameter.POSITIONAL_OR_KEYWORD if name in names else Parameter.KEYWORD_ONLY,
                default=Parameter.empty if fields[name].is_required() else fields[name].get_default(),
            )
            for name in sorted(fields, key=lambda name: names.index(name) if name in names else len(names))
        ]
    )
    return make


def reads_old_kinds(*specs: type[Spec]) -> BeforeValidator:
    """Make a union of `specs` read the kinds that earlier versions wrote."""
    names = {old: spec.model_fields["kind"].default for spec in specs for old in spec.old_kinds}

    def renamed(values: Any) -> Any:
        kind = values.get("kind") if isinstance(values, dict) else None
        return {**values, "kind": names[kind]} if isinstance(kind, str) and kind in names else values

    return BeforeValidator(renamed)


def as_today(section: Any, spec: Spec) -> Any:
    """Return a section of an older config as the class of `spec` writes it today; unchanged if it is of another."""
    try:
        return type(spec).model_validate_json(json.dumps(section)).model_dump(mode="json")
    except (ValueError, TypeError):
        return section


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


def checked_expression(key: str, value: str) -> str:
    """Return a regular expression.

    Raises:
        ConfigError: It is none.
    """
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigError(f"{key}={value!r} is no regular expression: {error}") from None
    return value
