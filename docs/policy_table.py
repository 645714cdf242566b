"""Make the table of what each policy needs and refuses, by trying it: each page's config with one thing changed."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from distgrow.config.load import parse
from distgrow.core.errors import ConfigError

PAGES = Path(__file__).parent / "policies"
#: Column → what is changed in the config of a policy's page; None removes a key.
TRIALS: Mapping[str, Mapping[str, Any]] = {
    "`stages`": {"stages": {"every": {"epochs": 1}}},
    "`budget.steps`": {"budget": {"steps": 500}},
    "momentum, AdamW": {"optimizer": {"kind": "adamw"}},
    "no `cap`": {"growth": {"cap": None}},
    "no `lr.decay`": {"lr": {"decay": None}},
    "one sample a batch": {"growth": {"start": 1}},
}


def table() -> str:
    """Return the table: a row for each policy, and in each column whether a run can begin."""
    rows = [
        f"| [`{page.stem}`](policies/{page.name}) | {' | '.join(_cells(page))} |" for page in sorted(PAGES.glob("*.md"))
    ]
    head = f"| policy | {' | '.join(TRIALS)} |", f"| --- |{' --- |' * len(TRIALS)}"
    return "\n".join(["", *head, *rows, ""])


def _cells(page: Path) -> Iterator[str]:
    """Yield the outcome of each trial of a page's config."""
    block = re.search(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert block is not None, f"{page.name} has no config"
    config = yaml.safe_load(block[1])
    yield from (_outcome(config, change) for change in TRIALS.values())


def _outcome(config: Mapping[str, Any], change: Mapping[str, Any]) -> str:
    """Return "yes" or "no" for a config that is changed, and "–" if the policy does not have what is changed."""
    changed = dict(config)
    for key, value in change.items():
        parts = dict(config.get(key) or {})
        if key in ("growth", "lr") and not set(value) <= {*parts, "decay"}:
            return "–"
        merged = {**parts, **value} if key in ("growth", "lr") else value
        changed[key] = {name: part for name, part in merged.items() if part is not None}
    try:
        parse(changed).controller().check()
    except ConfigError as error:
        return "–" if "of the training set" in str(error) else "no"  # a cap that keeps the batch within the data set
    return "yes"
