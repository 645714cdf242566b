"""Which schedules are held back, and the rank correlation; knows no run."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def halves(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the half of the names that was tuned on and the half that was held back, by their SHA-256."""
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]


def spearman(one: Sequence[float] | NDArray[np.float64], other: Sequence[float] | NDArray[np.float64]) -> float:
    """Return the rank correlation, equal values at the mean of their ranks; 0 if all of one side are equal."""
    first, second = ranks(one), ranks(other)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def ranks(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each value's rank from 0; equal values share the mean of theirs."""
    found = np.asarray(values, float)
    below = np.sum(found[:, None] > found, axis=1)
    return below + (np.sum(found[:, None] == found, axis=1) - 1) / 2
