"""What differs between the configs of several runs, key by key."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from distgrow.report.runs import Record

#: A config that is longer, in characters, or that has more values, is not compared.
LONGEST, MOST = 1_000_000, 10_000


def differences(records: Sequence[Record]) -> list[list[str]]:
    """Return rows of a key and its value in each run, for keys whose values differ; run.dir always does."""
    settings = [_settings(record.config) for record in records]
    if len(settings) < 2 or any(values is None for values in settings):
        return []
    known = [values for values in settings if values is not None]
    keys = dict.fromkeys(key for values in known for key in values if key != "run.dir")
    rows = [[key, *(values.get(key, "—") for values in known)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _settings(config: str) -> dict[str, str] | None:
    """Return the values of a config by dotted key; None if it cannot be read."""
    try:
        if len(config) > LONGEST or any(isinstance(token, yaml.AliasToken) for token in yaml.scan(config)):
            return None
        values = yaml.safe_load(config)
        settings: dict[str, str] = {}
        for key, value in _flat(values if isinstance(values, Mapping) else {}):
            settings[key] = value
            if len(settings) > MOST:
                return None
        return settings
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError):
        return None


def _flat(values: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", str(value)
