"""The mean of each metric over a data set that ranks share: what a batch may return, and how batches add up."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from distgrow.core.errors import ConfigError
from distgrow.distributed.world import World

#: Of a metric: its sum over batches, what the sum is divided by (None: rows), and the batches that had it.
Total = tuple[float, float | None, int]


def means(metrics: Callable[[Any], Any], batches: Iterable[tuple[Any, int]], world: World) -> dict[str, float]:
    """Return the mean of each metric over all ranks' batches. Collective: every rank must call.

    A number is a mean over the rows of its batch, which every batch must have. A pair (sum, count) counts by itself,
    and a batch may lack it: the mean is the sum of sums over the sum of counts, or NaN if that is 0.

    Args:
        metrics: Computes the metrics of a batch.
        batches: Pairs of a batch and its number of rows. Of a batch without rows the metrics are computed, as every
            rank must take part in a forward, and dropped.
        world: The ranks.

    Raises:
        ConfigError: Metrics are no such mapping, or some batches lack a metric that is a number.
    """
    totals: dict[str, Total] = {}
    seen, rows_seen, failure = 0, 0, None
    for batch, rows in batches:
        values = metrics(batch)
        if rows == 0:
            continue
        seen, rows_seen = seen + 1, rows_seen + rows
        try:
            for name, part in _parts(values, rows).items():
                totals[name] = _added(name, totals.get(name), part)
        except ConfigError as error:  # told at the end, as other ranks are still to take part in forwards
            failure = failure or error
    ranks = world.gather((failure, totals, seen, rows_seen))
    for error, *_ in ranks:
        if error is not None:
            raise error
    found, batches_seen, all_rows = zip(*(rank[1:] for rank in ranks), strict=True)
    return _joined(found, seen=sum(batches_seen), rows=sum(all_rows))


def check_metrics(values: Any) -> None:
    """Raise ConfigError if what a batch's metrics are is no mapping of numbers or pairs (sum, count)."""
    _parts(values, 1)


def _parts(values: Any, rows: int) -> dict[str, Total]:
    """Return what the metrics of one batch add to the totals."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"the metrics are a {type(values).__name__}; return a dict of names and values")
    return {name: _part(name, value, rows) for name, value in values.items()}


def _part(name: str, value: Any, rows: int) -> Total:
    """Return one batch's part of a metric."""
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ConfigError(f"the metric {name!r} has {len(value)} values; it must be a number or (sum, count)")
        return _number(name, value[0]), _number(name, value[1]), 1
    return _number(name, value) * rows, None, 1


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ConfigError(
            f"the metric {name!r} has shape {tuple(value.shape)}; it must be one number, a mean over rows, or a pair "
            "(sum, count)"
        )
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"the metric {name!r} is a {type(value).__name__}; it must be a number") from None


def _added(name: str, one: Total | None, other: Total) -> Total:
    if one is None:
        return other
    (one_sum, one_count, one_seen), (other_sum, other_count, other_seen) = one, other
    if (one_count is None) != (other_count is None):
        raise ConfigError(f"the metric {name!r} is a number in some batches and a pair in others; make it one of them")
    count = None if one_count is None or other_count is None else one_count + other_count
    return one_sum + other_sum, count, one_seen + other_seen


def _joined(ranks: Iterable[dict[str, Total]], *, seen: int, rows: int) -> dict[str, float]:
    """Return the means of what ranks have added up over `seen` batches of `rows` rows in all."""
    totals: dict[str, Total] = {}
    for found in ranks:
        for name, total in found.items():
            totals[name] = _added(name, totals.get(name), total)
    if lacking := sorted(name for name, (_, count, had) in totals.items() if count is None and had < seen):
        raise ConfigError(
            f"some batches lack the metrics {', '.join(lacking)}, so that their mean over rows is none; return each as "
            "a pair (sum, count) of what it counts, for example (right answers, rows of the class): a batch without "
            "any then adds (0, 0)"
        )
    divisors = {name: rows if count is None else count for name, (_, count, _) in totals.items()}
    return {name: totals[name][0] / divisors[name] if divisors[name] else math.nan for name in sorted(totals)}
