"""Read results that were stored under the kinds of earlier versions."""

from collections.abc import Mapping
from typing import Any, get_args

from distgrow.growth import Growth

#: The oldest kinds, by the kinds of today.
OLD = {spec.model_fields["kind"].default: spec.old_kinds[0] for spec in get_args(get_args(Growth)[0]) if spec.old_kinds}


def policy_today(name: str) -> str:
    """Return today's name of a policy. `name` may be an old one, in capitals or not."""
    today = {old: kind for kind, old in OLD.items()}
    return today.get(name.lower(), name)


def as_stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parts of a config with the oldest kind of their growth, from which the keys of stored runs are made."""
    growth = values["growth"]
    return {**values, "growth": {**growth, "kind": OLD.get(growth["kind"], growth["kind"])}}
