"""Checks of arguments, and arithmetic on floats and arrays alike; knows no formula."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Number = TypeVar("Number", float, Array)


def check_positive(**values: float | Array | Sequence[float]) -> None:
    """Check that every one of `values` is a number above 0 or an array of such.

    Raises:
        ValueError: One is not. The message names the first.
    """
    for key, value in values.items():
        if not (value > 0 if isinstance(value, float | int) else np.all(np.asarray(value) > 0)):
            raise ValueError(f"{key}={value} must be above 0")


def plain(value: Any) -> Any:
    """Return a numpy scalar as a Python float; an array as it is."""
    return value if isinstance(value, np.ndarray) else float(value)


def over(above: float | Array, below: Number) -> Number:
    """Return above/below elementwise. Return inf if `below` is not positive."""
    with np.errstate(divide="ignore"):
        return plain(np.divide(above, np.maximum(below, 0.0)))


def check_growth(growth: float, lr_factor: float, steps_factor: float = 1.0) -> None:
    """Check that δ > 1, γ > 0 and τ > 0.

    Raises:
        ValueError: One is not.
    """
    check_positive(lr_factor=lr_factor, steps_factor=steps_factor)
    if not growth > 1:
        raise ValueError(f"growth={growth} must be above 1: the batch's factor from stage to stage")
