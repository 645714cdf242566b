"""Checks of the values that events hold: each returns the value as it is used, or raises ValueError."""

from typing import Annotated, Any

#: A number beyond it is refused: figures that are drawn must leave room for arithmetic.
LARGEST = 1e300


class Optional:
    """Mark a key that lines of earlier versions may lack; it is then read as None."""


def count(value: Any) -> int:
    """Return a whole number of at least 0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError("must be a whole number of at least 0")
    return value


def positive(value: Any) -> int:
    """Return a whole number above 0."""
    try:
        return count(value) or _not_zero()
    except ValueError:
        raise ValueError("must be a whole number above 0") from None


def _not_zero() -> int:
    raise ValueError


def number(value: Any) -> float:
    """Return a number of either sign that is finite."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < LARGEST:
        raise ValueError("must be a finite number")
    return value


def amount(value: Any) -> float:
    """Return a finite number of at least 0."""
    try:
        if number(value) >= 0:
            return value
    except ValueError:
        pass
    raise ValueError("must be a finite number of at least 0")


def above_zero(value: Any) -> float:
    """Return a finite number above 0."""
    try:
        if number(value) > 0:
            return value
    except ValueError:
        pass
    raise ValueError("must be a finite number above 0")


def figure(value: Any) -> float | None:
    """Return a finite number, or None for one that was not finite."""
    return None if value is None else number(value)


def text(value: Any) -> str:
    """Return a text."""
    if not isinstance(value, str):
        raise ValueError("must be a text")
    return value


def texts(value: Any) -> list[str]:
    """Return a list of texts."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("must be a list of texts")
    return value


def figures(value: Any) -> list[float | None]:
    """Return a list of finite numbers, with None for each that was not finite."""
    if not isinstance(value, list):
        raise ValueError("must be a list of numbers")
    return [figure(item) for item in value]


def rows(value: Any) -> list[list[float | None]]:
    """Return lists of finite numbers, with None for each that was not finite."""
    if not isinstance(value, list):
        raise ValueError("must be a list of lists of numbers")
    return [figures(item) for item in value]


def counts(value: Any) -> list[int]:
    """Return a list of whole numbers of at least 0."""
    if not isinstance(value, list):
        raise ValueError("must be a list of whole numbers")
    return [count(item) for item in value]


def truth(value: Any) -> bool:
    """Return True or False."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def shown_number(value: Any) -> float | None:
    """Return the value if it is a finite number, else None."""
    try:
        return number(value)
    except ValueError:
        return None


Count = Annotated[int, count]
Positive = Annotated[int, positive]
Amount = Annotated[float, amount]
Above0 = Annotated[float, above_zero]
Figure = Annotated[float | None, figure]
Figures = Annotated[list[float | None], figures]
Rows = Annotated[list[list[float | None]], rows]
Counts = Annotated[list[int], counts]
Text = Annotated[str, text]
Truth = Annotated[bool, truth]

OldCount = Annotated[int | None, count, Optional()]
OldAmount = Annotated[float | None, amount, Optional()]
OldFigure = Annotated[float | None, figure, Optional()]
OldFigures = Annotated[list[float | None] | None, figures, Optional()]
Texts = Annotated[list[str], texts]
OldText = Annotated[str | None, text, Optional()]
OldTexts = Annotated[list[str] | None, texts, Optional()]
OldTruth = Annotated[bool | None, truth, Optional()]
