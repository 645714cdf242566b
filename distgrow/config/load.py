"""Read a config file and its `a.b=c` overrides as a Run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distgrow.config.old_names import renamed
from distgrow.config.run import Run
from distgrow.core.errors import ConfigError
from distgrow.core.spec_errors import explain
from distgrow.core.yaml_text import plain, read_file, read_text


def load(path: str | Path, overrides: Sequence[str] = (), *, tell: Callable[[str], None] | None = None) -> Run:
    """Read a config file, apply `a.b=c` overrides, and return the Run.

    Args:
        path: The config file.
        overrides: Overrides of its keys.
        tell: Called with a line for each name of an earlier version.

    Raises:
        ConfigError: if anything is wrong with it.
    """
    values = read_file(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, this is {type(plain(values)).__name__}")
    for k, override in enumerate(overrides):
        check_order(values, overrides[:k], override)
        values = apply(values, override)
    if "task" not in values and Path(path).with_name("metrics.jsonl").is_file():
        raise ConfigError(
            f"{path} is the record of a run whose model and data are in a script, not in a config: go on there, with "
            "fit(…, resume=True), or add a task"
        )
    run = parse(values)
    if tell is not None:
        for line in told_names(values):
            tell(line)
    return run.kept_in(run.run.dir.replace("{name}", Path(path).stem))


def parse(values: Mapping[str, Any]) -> Run:
    """Return nested mappings as a Run. Raise ConfigError if anything is wrong with them."""
    try:
        return Run.model_validate(plain(dict(values)))
    except ValidationError as error:
        raise ConfigError("\n".join([*explain(error, Run, values), *told_names(values)])) from None


def told_names(values: Mapping[str, Any]) -> list[str]:
    """Return a line for each name of an earlier version in `values`, as messages use today's."""
    return [f"{name.key}: {name.old} is read as {name.today}, its name today" for name in renamed(values, Run)]


def check_order(values: Mapping[str, Any], before: Sequence[str], override: str) -> None:
    """Check that an override of a kind drops no key that an earlier override gave.

    Raises:
        ConfigError: It does.
    """
    parent, dot, last = override.partition("=")[0].strip().rpartition(".")
    if last != "kind" or not dot:
        return
    given = [each for each in before if each.partition("=")[0].strip().startswith(f"{parent}.")]
    changed = apply(dict(values), override)
    lost = [each for each in given if apply(changed, each) != changed and not each.startswith(f"{parent}.kind")]
    if lost:
        raise ConfigError(f"{override} drops {lost[0]}, which stands before it; give the kind first")


def apply(values: dict[str, Any], override: str) -> dict[str, Any]:
    """Return `values` with one `a.b=c` override, in which c is YAML. A new `kind` drops the old kind's other keys."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"override {override!r} must read key.subkey=value")
    shown = override if len(override) <= 80 else override[:80] + " …"
    return _replaced(values, path, read_text(text, f"override {shown!r}"), key)


def _replaced(values: Mapping[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        union = key != "launch.kind"  # launchers skip each other's keys
        changes_kind = union and head == "kind" and values.get("kind") not in (None, value)
        return {"kind": value} if changes_kind else {**values, head: value}
    inner = values.get(head)
    if inner is not None and not isinstance(inner, Mapping):
        raise ConfigError(f"override {key}: {head} is the value {plain(inner)!r} in the config, not a mapping")
    return {**values, head: _replaced(inner or {}, rest, value, key)}
