"""Batches that a config gives in tokens, as samples; knows how many tokens a sample of a task has."""

from collections.abc import Mapping
from typing import Any

from distgrow.core.errors import ConfigError
from distgrow.tasks.builtin import Text
from distgrow.tasks.token_data import TokenData


def with_batches_in_samples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose growth has {tokens: …} replaced by as many samples.

    Raises:
        ConfigError: Samples do not have as many tokens each, or the batch would be no whole number of them.
    """
    growth = values.get("growth")
    if not isinstance(growth, Mapping):
        return dict(values)
    changed = {key: _in_samples(value, values.get("task"), f"growth.{key}") for key, value in growth.items()}
    return {**values, "growth": changed}


def _in_samples(value: Any, task: Any, key: str) -> Any:
    if isinstance(value, list):
        return [_in_samples(part, task, key) for part in value]
    if not isinstance(value, Mapping) or set(value) != {"tokens"}:
        return value
    tokens, each = value["tokens"], tokens_of(task)
    if isinstance(tokens, bool) or not isinstance(tokens, int | float) or tokens != tokens or not 0 < tokens < 2**62:
        raise ConfigError(f"{key}={{tokens: {tokens!r}}} must be a positive number of tokens")
    if each is None:
        raise ConfigError(
            f"{key}={{tokens: {tokens:g}}} needs samples of as many tokens each, as task.kind=text has; a target "
            "says how many in task.tokens; or give a plain number of samples"
        )
    if tokens % each:
        raise ConfigError(
            f"{key}={{tokens: {tokens:g}}} is {tokens / each:g} samples of {each} tokens; give a multiple of {each}"
        )
    return int(tokens // each)


def tokens_of(task: Any) -> int | None:
    """Return the tokens of every sample of a task, as a config gives it; None if that is not known."""
    if not isinstance(task, Mapping):
        return None
    specs = {"text": Text, "corpus": TokenData, "hf": TokenData}
    spec = specs.get(str(task.get("kind")))
    tokens = task.get("tokens") if spec is None else task.get("length", spec.model_fields["length"].default)
    return tokens if isinstance(tokens, int) and tokens > 0 else None
