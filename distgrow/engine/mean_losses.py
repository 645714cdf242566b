"""Whether a loss is the mean of its parts' losses, and what is said if it is not; knows no model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distgrow.engine.trial_rows import Rows

#: Rows of the first of two parts of a pass.
FIRST = 3


@dataclass(frozen=True, slots=True)
class Losses:
    """Hold batches whose losses are compared: one, and two that have together all its rows, some times each."""

    whole: Rows
    parts: tuple[Rows, Rows]
    counts: Mapping[Rows, float] | None  #: items of each; None: rows

    @property
    def all(self) -> tuple[Rows, Rows, Rows]:
        return self.whole, *self.parts

    def are_means(self, losses: Sequence[float], tolerance: float, least: float) -> bool:
        """Return whether the losses of `all` are means over rows, or over items; undecided if nothing is counted."""
        counted = [len(rows) if self.counts is None else self.counts[rows] for rows in self.parts]
        return not any(counted) or is_mean(losses[0], list(zip(counted, losses[1:], strict=True)), tolerance, least)

    def refusal(self, losses: Sequence[float]) -> str:
        """Return why the losses of `all` are refused."""
        (whole, first, second), (one, other) = losses, map(len, self.parts)
        times = (one + other) / len(self.whole)
        seen = (
            f"{whole:.6g} for {len(self.whole)} samples, but {first:.6g} and {second:.6g} for {one} and {other} of them"
            if times == 1
            else f"{whole:.6g} for two samples, but {first:.6g} and {second:.6g} with one of them repeated {one - 1} "
            "times"
        )
        is_sum = math.isclose(times * whole, first + second, rel_tol=0.03)
        return refusal_of(seen, is_sum=is_sum, by_items=self.counts is not None)


def parts_of(group: Rows) -> tuple[Rows, Rows]:
    """Return two parts of a group, of different sizes if it has more than two rows."""
    cut = max(1, min(FIRST, (len(group) - 1) // 2))
    return group[:cut], group[cut:]


def is_mean(whole: float, parts: Sequence[tuple[float, float]], tolerance: float, least: float = 0.0) -> bool:
    """Return whether a loss is the mean of its parts, given as (rows or items, loss), up to a tolerance.

    It is relative to the losses, or to `least` if they are smaller.
    """
    mean = math.fsum(rows * loss for rows, loss in parts) / sum(rows for rows, _ in parts)
    scale = max(least, abs(whole), *(abs(loss) for _, loss in parts))
    return abs(whole - mean) <= tolerance * scale


def refusal_of(seen: str, *, is_sum: bool, by_items: bool) -> str:
    depends = "so training would depend on engine.max_micro and the number of ranks"
    if by_items:
        way_out = "it is their sum: divide it by their number" if is_sum else "let items count what the loss divides by"
        return f"the loss is no mean over items: at trial parameters it is {seen}, {depends}; {way_out}"
    way_out = (
        "it is their sum: divide it by the number of rows"
        if is_sum
        else "a mean over tokens or labels or by class weights is none: say with items=… what it is a mean over, such "
        "as items=lambda batch: (batch['labels'] != -100).sum(), or take the mean of each row first; a loss over pairs "
        "of rows is none either"
    )
    return (
        f"the loss is no mean over samples: at trial parameters it is {seen}, {depends}; return the mean over the rows "
        f"of the batch: {way_out}"
    )
