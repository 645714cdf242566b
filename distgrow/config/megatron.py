"""Megatron's --step-batch-size-schedule in a config, as growth.batches and stages; knows no task."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from distgrow.core.errors import ConfigError
from distgrow.growth.steps import Steps

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_PART = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?):(\d+)")
_KINDS = {Steps.model_fields["kind"].default, *Steps.old_kinds}


def with_schedule_as_stages(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose growth.schedule is replaced by growth.batches and stages in tokens, as Megatron reads it.

    "0:768 250B:1536" is a batch of 768 samples, and of 1536 once 250 · 10⁹ tokens are consumed.

    Raises:
        ConfigError: It is no such schedule, or batches or stages are given beside it.
    """
    growth = values.get("growth")
    if not isinstance(growth, Mapping) or "schedule" not in growth or growth.get("kind") not in _KINDS:
        return dict(values)
    beside = [*(["growth.batches"] if "batches" in growth else []), *(["stages"] if values.get("stages") else [])]
    if beside:
        raise ConfigError(f"growth.schedule gives batches and stages: remove {' and '.join(beside)}")
    batches, starts = _parsed(growth["schedule"])
    rest = {key: value for key, value in growth.items() if key != "schedule"}
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    stages = {"stages": {"every": {"tokens": lengths}}} if lengths else {}
    return {**values, "growth": {**rest, "batches": batches}, **stages}


def _parsed(schedule: Any) -> tuple[list[int], list[int]]:
    """Return the batches of a schedule, and the tokens at which each begins."""
    parts = schedule.split() if isinstance(schedule, str) else []
    found = [_PART.fullmatch(part) for part in parts]
    starts = [Decimal(match[1]) * _SUFFIXES[match[2]] for match in found if match]
    batches = [int(match[3]) for match in found if match]
    rising = all(one < other for one, other in zip(starts, starts[1:], strict=False))
    whole = all(start == int(start) for start in starts)
    if not parts or not all(found) or starts[0] != 0 or not rising or not whole or min(batches) < 1:
        raise ConfigError(
            f'growth.schedule={schedule!r} must read as Megatron\'s --step-batch-size-schedule, "0:768 250B:1536": '
            "tokens (K, M, B or T: 10³ to 10¹²) and, from there on, samples of a batch; tokens begin with 0 and rise"
        )
    return batches, [int(start) for start in starts]
