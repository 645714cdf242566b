"""Names of an earlier version in a config, and what they are called today; they are read all the same."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from distgrow.core.spec import Spec
from distgrow.core.spec_errors import models_of, tags_of


class Renamed(NamedTuple):
    """Hold an old name that a config uses."""

    key: str  #: where it is, in today's names
    old: str
    today: str


def renamed(values: Any, spec: type[BaseModel], above: str = "") -> Iterator[Renamed]:
    """Yield the old names of keys and kinds in nested mappings, which `spec` reads."""
    if not isinstance(values, Mapping):
        return
    old_keys = spec.old_keys if issubclass(spec, Spec) else {}
    for word, value in values.items():
        key = old_keys.get(word, word)
        path = f"{above}{key}"
        if key != word:
            yield Renamed(path, word, key)
        inner = _read_by(value, models_of(spec.model_fields[key].annotation)) if key in spec.model_fields else None
        if inner is None:
            continue
        if value.get("kind") in inner.old_kinds:
            yield Renamed(f"{path}.kind", value["kind"], tags_of(inner)[0])
        yield from renamed(value, inner, f"{path}.")


def _read_by(value: Any, options: list[type[BaseModel]]) -> type[Spec] | None:
    """Return the spec that reads a section: the only one, or the one of its kind."""
    if not isinstance(value, Mapping):
        return None
    specs = [option for option in options if issubclass(option, Spec)]
    of_kind = [spec for spec in specs if value.get("kind") in (*tags_of(spec), *spec.old_kinds)]
    found = specs if len(specs) == 1 else of_kind
    return found[0] if found else None
