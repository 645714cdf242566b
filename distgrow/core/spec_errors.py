"""Errors of specs and configs: what pydantic reports, in the words of the user."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

#: Marks a key that only distgrow writes, into the config.yaml of a run: no error names it among what users may write.
RECORDED = "recorded"


def explain(error: ValidationError, whole: type[BaseModel], values: Any = None) -> list[str]:
    """Return one line per mistake in a `whole`: key, value, what is allowed, and a fix.

    Args:
        error: What pydantic reports.
        whole: The spec that was validated.
        values: What was validated. Numbers in it that remember their words are shown as they were written.
    """
    lines: dict[str, str] = {}
    for item in error.errors():
        location, owner = _locate(item["loc"], whole, unknown_key=item["type"] == "extra_forbidden")
        key = ".".join(location)
        complaint = _complaint(item, location, owner, _written(values, location, item["input"]))
        if key in lines and item["type"] == "literal_error":  # a number or a word: both are allowed
            lines[key] += f", or {item.get('ctx', {})['expected']}"
        lines.setdefault(key, f"{key or 'config'}{complaint}" if key or complaint[0] != ":" else complaint[2:])
    return list(lines.values())


def _complaint(item: Any, location: list[str], owner: type[BaseModel] | None, written: str) -> str:
    known = owner.model_fields if owner else {}
    match item["type"]:
        case "extra_forbidden":
            hint = _hint(location, item["input"], written, owner)
            return f": unknown key; {hint}allowed here: {', '.join(_for_users(owner))}"
        case "missing":
            return f": is missing; add it: {known[location[-1]].description}"
        case "union_tag_invalid":
            given, allowed = item["ctx"]["tag"], item["ctx"]["expected_tags"]
            close = difflib.get_close_matches(given, re.findall(r"\w+", allowed))
            close.sort(key=lambda kind: not kind.startswith(given))
            hint = f"did you mean {close[0]!r}? " if close else ""
            return f".kind={given!r}: unknown; {hint}allowed: {allowed}"
        case "union_tag_not_found":
            return (
                f": needs a kind; write {location[-1]}: {{kind: …}}; allowed: {', '.join(_kinds(owner, location[-1]))}"
            )
        case "string_type":
            return f"={written}: must be a text; quote it: {location[-1]}: '{written}'"
        case "model_attributes_type" | "model_type" | "dict_type":
            return f"={item['input']!r}: must be a mapping; write {_mapping(location, item['input'], owner)}"
        case "value_error":
            return f": {item['ctx']['error']}"
        case _:
            message = item["msg"].removeprefix("Input ").replace("should", "must")
            return f"={written}: {message}"


def _hint(location: Sequence[str], value: Any, written: str, owner: type[BaseModel] | None) -> str:
    """Return what to write in place of an unknown key: the same key further inside, or a key with a similar name."""
    *above, key = location
    known = _for_users(owner)
    if inside := [field for field in known if key in _keys(known[field].annotation)]:
        shown = "…" if value is None or isinstance(value, dict) else written
        options = [f"{field}: {{{key}: {shown}}}" for field in inside]
        return f"write {' or '.join(f'{above[-1]}: {{{option}}}' if above else option for option in options)}; "
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _mapping(location: Sequence[str], value: Any, owner: type[BaseModel] | None) -> str:
    """Return how a key is written whose value must be a mapping."""
    key = location[-1]
    inside = _keys(owner.model_fields[key].annotation) if owner and key in owner.model_fields else []
    if isinstance(value, str) and ("kind" in inside or not inside):
        return f"{key}: {{kind: {value}}}"
    return f"{key}: {{…}}" + (f", with the keys {', '.join(inside)}" if inside else "")


def _keys(annotation: Any) -> list[str]:
    """Return the keys of the specs that a field's annotation names."""
    return list(dict.fromkeys(name for spec in models_of(annotation) for name in _for_users(spec)))


def _for_users(spec: type[BaseModel] | None) -> dict[str, FieldInfo]:
    """Return the fields of a spec that users may write; none without one."""
    fields = spec.model_fields if spec else {}
    return {name: field for name, field in fields.items() if RECORDED not in field.metadata}


def _written(values: Any, location: Sequence[str], given: Any) -> str:
    """Return a value as the config's author wrote it, if it is a number of `values`, else as Python shows it."""
    for key in location:
        inner = values.get(key) if isinstance(values, Mapping) else None
        if inner is None and isinstance(values, list) and key.isdecimal() and int(key) < len(values):
            inner = values[int(key)]
        values = inner
    return getattr(values, "word", repr(given))


def _locate(
    path: Sequence[Any], whole: type[BaseModel], *, unknown_key: bool
) -> tuple[list[str], type[BaseModel] | None]:
    """Return a pydantic location as config keys, and the spec that the last of them belongs to.

    The tags of unions and the names of their branches, which pydantic mixes in, are left out.
    """
    location: list[str] = []
    spec: type[BaseModel] | None = whole
    owner: type[BaseModel] | None = whole
    options: list[type[BaseModel]] = []
    for at, part in enumerate(path):
        chosen = next((option for option in options if part in tags_of(option)), None)
        if spec is not None and part in spec.model_fields:
            location.append(part)
            owner, options = spec, models_of(spec.model_fields[part].annotation)
            spec = options[0] if len(options) == 1 else None
        elif chosen is not None:
            spec, options = chosen, []
        elif isinstance(part, int) or (unknown_key and at == len(path) - 1):
            location.append(str(part))
            owner = spec
    return location, owner


def _kinds(owner: type[BaseModel] | None, key: str) -> list[str]:
    """Return the kinds that a key's union has."""
    specs = models_of(owner.model_fields[key].annotation) if owner and key in owner.model_fields else []
    return [repr(kind) for spec in specs for kind in tags_of(spec)]


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the specs that a field's annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_of(argument)]


def tags_of(spec: type[BaseModel]) -> tuple[Any, ...]:
    """Return the kinds that a spec stands for."""
    return get_args(spec.model_fields["kind"].annotation) if "kind" in spec.model_fields else ()
