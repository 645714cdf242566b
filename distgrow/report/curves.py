"""Curves of a run: one number of its events against SFO, steps and seconds, smoothed and thinned; draws nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from distgrow.report.runs import Events

Array = np.ndarray[Any, np.dtype[Any]]

#: Keys of all events that a curve can be drawn against.
PLACES = ("sfo", "step", "time_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Points in the order of the run: places on each axis, a value, the samples consumed by then and the batch."""

    places: dict[str, Array]
    values: Array
    samples: Array
    batch: Array


def curve(events: Events, kind: str, key: str) -> Curve:
    """`key` of all events of a kind that have it."""
    rows = [event for event in events if event["event"] == kind and event.get(key) is not None]
    return Curve(
        places={place: _column(rows, place) for place in PLACES},
        values=_column(rows, key),
        samples=_column(rows, "samples"),
        batch=np.array([row.get("batch", 1) for row in rows], dtype=float),
    )


def _column(rows: Sequence[dict[str, Any]], key: str) -> Array:
    return np.array([row[key] for row in rows], dtype=float)


def smooth(points: Curve, at: Array, share: float = 0.03) -> Array:
    """Mean value per sample in a window of `share` of all samples around each of the points `at`, cut at the ends.

    A window of samples holds few large batches or many small ones, which are as noisy together.
    """
    samples, reach = points.samples, share / 2 * np.ptp(points.samples)
    low = np.searchsorted(samples, samples[at] - reach, side="left")
    high = np.searchsorted(samples, samples[at] + reach, side="right")
    windows = [slice(*ends) for ends in zip(low, high, strict=True)]
    return np.array([np.average(points.values[window], weights=points.batch[window]) for window in windows])


def thin(values: Array, batch: Array, most: int = 2000) -> Array:
    """Indices of about `most` points that look like all: both ends, spikes, both sides of each change of batch."""
    count, share = len(values), most // 4
    if count <= most:
        return np.arange(count)
    edges = np.flatnonzero(np.diff(batch))
    if len(edges) > share:
        edges = edges[np.linspace(0, len(edges) - 1, share).astype(int)]
    bounds = pairwise(np.linspace(0, count, share + 1).astype(int))
    spikes = [begin + pick(values[begin:end]) for begin, end in bounds for pick in (np.argmin, np.argmax)]
    return np.unique(np.concatenate([[0, count - 1], edges, edges + 1, spikes]).astype(int))
