"""Reads a config file and its `a.b=c` overrides as a Run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from distgrow.config.errors import explain
from distgrow.config.run import Run
from distgrow.core.errors import ConfigError

# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-3 is a number, not a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """A config file with `a.b=c` overrides as a Run. ConfigError where anything is wrong with it."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # a subclass of SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, this is {type(values).__name__}")
    for override in overrides:
        values = apply(values, override)
    return parse(values)


def parse(values: Mapping[str, Any]) -> Run:
    """Nested mappings as a Run. ConfigError where anything is wrong with them."""
    try:
        return Run.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, Run))) from None


def apply(values: dict[str, Any], override: str) -> dict[str, Any]:
    """`values` with one `a.b=c` override; c is YAML. A new `kind` drops the old kind's other keys."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"override {override!r} must read key.subkey=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
    return _placed(values, path, value, key)


def _placed(values: Mapping[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        union = key != "launch.kind"  # one spec whatever the kind
        changes_kind = union and head == "kind" and values.get("kind") not in (None, value)
        return {"kind": value} if changes_kind else {**values, head: value}
    inner = values.get(head)
    if inner is not None and not isinstance(inner, Mapping):
        raise ConfigError(f"override {key}: {head} is the value {inner!r} in the config, not a mapping")
    return {**values, head: _placed(inner or {}, rest, value, key)}
