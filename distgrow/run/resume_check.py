"""Which settings may change when a run is resumed."""

from collections.abc import Mapping
from typing import Any

#: Keys that may change on resume: they decide where and how fast a run goes on, not what it computes.
FREE = (
    "launch",
    "theory",
    "lr.test",
    "engine.max_micro",
    "engine.device",
    "engine.compile",
    "engine.find_unused",
    "engine.bucket_mb",
    "engine.workers",
    "engine.wait_s",
    "engine.resources",
    "engine.wrap",
    "engine.shard",
    "engine.replicas",
    "engine.reduce",
    "engine.offload",
    "engine.checkpoint_blocks",
    "run",
)

BOUND = ("run.seed", "run.noise")

#: Keys that may change on resume if they change nothing but where the run ends, or if that is accepted (--rebudget).
PLANNED = ("budget",)

#: Keys that are compared if the folder has them: earlier versions recorded fewer.
IF_RECORDED = ("optimizer.settings",)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys (dotted) with other values, among those that decide what is computed."""
    old, new = flatten(before), flatten(after)
    keys = [key for key in {**old, **new} if under(key, BOUND) or not under(key, FREE)]
    keys = [key for key in keys if key in old or not under(key, IF_RECORDED)]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def with_measured_rate(before: Mapping[str, Any], after: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return recorded settings with the rate that `lr.base: auto` was measured as, if that is `lr.base` of `after`."""
    old, new = before.get("lr"), after.get("lr")
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return before
    if old.get("base") != "auto" or old.get("measured") is None or old["measured"] != new.get("base"):
        return before
    return {**before, "lr": {**old, "base": old["measured"], "measured": None}}


def under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings → one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
