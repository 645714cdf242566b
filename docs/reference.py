"""Make the configuration reference from the typed config: every key, its type, default, range and docstring."""

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distgrow.config.run import Run

HEAD = """\
# Configuration

After this page you know every key of a config: its type, its default and what it does.

- `a.b=c` on the command line overrides any key. A key that is not given has its default.
- Another `kind` on the command line begins its part anew. `optimizer.kind=muon` drops the file's `clip` and `no_decay`,
  and `growth.kind=exponential` its `start`. Give them again, after the kind. `launch` alone keeps its keys.
- `budget` is the only key that has to be given.
- Unknown keys, wrong types and values out of range are refused. The message names the key, its value and what is
  allowed.
- `null` means "none". [D] marks a formula that was [derived for this project](theory.md).
- [Policies](policies.md) says which `growth` is for what. Other words are in the [glossary](glossary.md).

This page is made from the types of the config: `python docs/generate.py` makes it again, and `make check` fails if it
is not current.
"""
FIRST = ("task", "model")  #: keys that the page begins with; the others follow in the order of the code
LIMITS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "`null`"}


def configuration() -> str:
    """Return the whole page."""
    names = [*FIRST, *(name for name in Run.model_fields if name not in FIRST)]
    return "\n".join([HEAD, *(line for name in names for line in _key(name, Run.model_fields[name]))])


def specs(annotation: Any) -> list[type[BaseModel]]:
    """Return the specs that a field's annotation names; the members of a union in their order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [spec for argument in get_args(annotation) for spec in specs(argument)]


def keys(spec: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the keys that can be given to a spec, without its kind."""
    yield from (
        (name, field) for name, field in spec.model_fields.items() if name != "kind" and field.init is not False
    )


def kinds(spec: type[BaseModel]) -> tuple[str, ...]:
    """Return the kinds that a spec stands for."""
    return get_args(spec.model_fields["kind"].annotation) if "kind" in spec.model_fields else ()


def slug(title: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _key(name: str, field: FieldInfo) -> Iterator[str]:
    """Yield the section of a top-level key: its specs, and then the specs within those."""
    default = "This key has to be given." if field.is_required() else f"Default: `{_shown(field.get_default())}`."
    yield from (f"## {name}", "", f"{_sentence(field)} {default}", "")
    waiting = [(name, spec, len(specs(field.annotation)) == 1) for spec in specs(field.annotation)]
    seen = {spec for _, spec, _ in waiting}
    while waiting:
        path, spec, alone = waiting.pop(0)
        yield from _spec(path, spec, alone=alone)
        for key, inner in keys(spec):
            new = [each for each in specs(inner.annotation) if each not in seen]
            waiting += [(f"{path}.{key}", each, len(specs(inner.annotation)) == 1) for each in new]
            seen |= set(new)


def _spec(path: str, spec: type[BaseModel], *, alone: bool) -> Iterator[str]:
    """Yield the section of a spec: its docstring, and a row for each key."""
    if not alone or "." in path:
        title = path if alone else f"{path}: {{kind: {' | '.join(kinds(spec))}}}"
        yield from (f"### `{title}`", "", inspect.cleandoc(spec.__doc__ or ""), "")
    rows = [*([("kind", spec.model_fields["kind"])] if alone and kinds(spec) else []), *keys(spec)]
    if not rows:
        return
    schema = spec.model_json_schema(ref_template="{model}")["properties"]
    yield from ("| key | type | default | what |", "| --- | --- | --- | --- |")
    for name, field in rows:
        default = "required" if field.is_required() else f"`{_shown(field.get_default())}`"
        cells = (f"`{name}`", _kind(schema[name], specs(field.annotation), f"{path}.{name}"), default, _sentence(field))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _kind(schema: Mapping[str, Any], within: Sequence[type[BaseModel]] = (), path: str = "") -> str:
    """Return a type with its range, from its JSON schema."""
    if within:
        names = [kind for spec in within for kind in kinds(spec)]
        return (
            f"of kind {', '.join(f'`{name}`' for name in names)}"
            if len(within) > 1
            else f"[keys of its own](#{slug(path)})"
        )
    options = schema.get("anyOf")
    if options:
        return " or ".join(_kind(option) for option in options)
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{_shown(value)}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    if schema.get("type") == "object":
        return "mapping"
    limits = [text.format(_number(schema[key])) for key, text in LIMITS.items() if key in schema]
    return " ".join([NAMES[schema["type"]] if "type" in schema else "several forms", ", ".join(limits)]).strip()


def _number(value: float) -> str:
    """Return a limit in short form."""
    power = math.log2(value) if value > 2**31 else 0.5
    return f"2^{power:g}" if power == int(power) else f"{value:,.10g}"


def _shown(value: Any) -> str:
    """Return a value as it is written in a config."""
    if isinstance(value, BaseModel):
        own = {"kind": value.model_dump()["kind"]} if kinds(type(value)) else {}
        value = {**own, **value.model_dump(mode="json", exclude_unset=True)}
    if isinstance(value, list):
        value = [
            each.model_dump(mode="json", exclude_unset=True) if isinstance(each, BaseModel) else each for each in value
        ]
    if value is None:
        return "null"
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _sentence(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())
