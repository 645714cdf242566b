"""Curves of a run: one number of its lines against SFO, steps and seconds, smoothed and thinned; draws nothing."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from distgrow.report.log import Array
from distgrow.report.runs import Record
from distgrow.tracking.fields import shown_number

#: Keys of all lines that a curve can be drawn against.
AXIS_KEYS = ("sfo", "step", "time_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Hold points in the order of the run: x on each axis, a value, the samples consumed by then and the batch."""

    x: dict[str, Array]  #: by the keys of AXIS_KEYS
    values: Array
    samples: Array
    batch: Array


def curve(record: Record, kind: str, key: str) -> Curve:
    """Return `key` of all lines of a kind that have it as a finite number."""
    columns = record.steps if kind == "step" else _figures(record, kind, key)
    known = np.isfinite(columns[key])
    return Curve(
        x={axis: columns[axis][known] for axis in AXIS_KEYS},
        values=columns[key][known],
        samples=columns["samples"][known],
        batch=columns["batch"][known],
    )


def _figures(record: Record, kind: str, key: str) -> dict[str, Array]:
    lines = [event.to_json() for event in record.events if event.kind == kind]
    rows = [line for line in lines if shown_number(line.get(key)) is not None]
    columns = {name: np.array([row[name] for row in rows], dtype=float) for name in (*AXIS_KEYS, "samples", key)}
    return {**columns, "batch": np.ones(len(rows))}


def smooth(points: Curve, at: Array, share: float = 0.03) -> Array:
    """Return the mean per sample in a window of `share` of all samples around each point of `at`, cut at the ends.

    A window of samples holds few large batches or many small ones, which are as noisy together.
    """
    samples, reach = points.samples, share / 2 * np.ptp(points.samples)
    low = np.searchsorted(samples, samples[at] - reach, side="left")
    high = np.searchsorted(samples, samples[at] + reach, side="right")
    windows = [slice(*ends) for ends in zip(low, high, strict=True)]
    return np.array([np.average(points.values[window], weights=points.batch[window]) for window in windows])


def thin(values: Array, batch: Array, most: int = 2000) -> Array:
    """Return the indices of about `most` points that look like all: ends, spikes, both sides of a change of batch."""
    count, share = len(values), most // 4
    if count <= most:
        return np.arange(count)
    edges = np.flatnonzero(np.diff(batch))
    if len(edges) > share:
        edges = edges[np.linspace(0, len(edges) - 1, share).astype(int)]
    bounds = pairwise(np.linspace(0, count, share + 1).astype(int))
    spikes = [begin + pick(values[begin:end]) for begin, end in bounds for pick in (np.argmin, np.argmax)]
    return np.unique(np.concatenate([[0, count - 1], edges, edges + 1, spikes]).astype(int))
