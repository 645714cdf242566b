"""Fronts of (steps, loss), how two of them compare, and the search for a learning rate; knows nothing of runs.

A front is the lower left convex hull of points over log₂ of the steps. Between two of its points the loss is
interpolated along the hull; beyond its last point it stays, as nobody has to take more steps. Before its first it is
not known.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

Place = tuple[float, float]  #: steps, loss
DRAWS = 200  #: of the bootstrap over more than three seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Bracket:
    """The learning rate of least loss on a grid of powers of two."""

    best: int  #: exponent
    open: str  #: "low" or "high" if the search stopped at that end of the grid, else ""


def bracket(loss: Callable[[int], float], start: int, lowest: int, highest: int) -> Bracket:
    """Return the exponent that is no worse than both of its neighbours, walking from `start`.

    Of equal losses the first that was seen counts. inf (diverged) is above every loss; if all are inf, the search goes
    down. An end of the grid that is best is marked as open: the minimum may lie beyond it.
    """
    seen = {start: loss(start)}
    while True:
        best = min(seen, key=lambda each: seen[each])
        if math.isinf(seen[best]):
            best = min(seen)
        around = [each for each in (best - 1, best + 1) if lowest <= each <= highest and each not in seen]
        if not around:
            return Bracket(best=best, open="low" if best == lowest else "high" if best == highest else "")
        seen[around[0]] = loss(around[0])


def hull(places: Sequence[Place]) -> list[int]:
    """Return the indices of the points of the lower left convex hull over log₂ steps, by rising steps.

    It begins with the fewest steps and ends with the least loss. Points that are not finite are never on it.
    """
    finite = [index for index, place in enumerate(places) if all(map(math.isfinite, place))]
    chain: list[int] = []
    for index in sorted(finite, key=lambda each: places[each]):
        if chain and places[index][1] >= places[chain[-1]][1]:
            continue  # no better, with no fewer steps
        while len(chain) > 1 and not _turns_left(places[chain[-2]], places[chain[-1]], places[index]):
            chain.pop()
        chain.append(index)
    return chain


def _turns_left(first: Place, middle: Place, last: Place) -> bool:
    """Return whether the middle point lies below the line from the first to the last."""
    x, y, z = (math.log2(place[0]) for place in (first, middle, last))
    return (y - x) * (last[1] - first[1]) > (z - x) * (middle[1] - first[1])


def front(places: Sequence[Place]) -> list[Place]:
    """Return the points of the hull."""
    return [places[index] for index in hull(places)]


def loss_at(line: Sequence[Place], steps: float) -> float | None:
    """Return the loss of a front after so many steps; None: it has no point with so few."""
    if not line or steps < line[0][0] * (1 - 1e-12):
        return None
    for (x, low), (y, high) in pairwise(line):
        if steps <= y:
            part = (math.log2(steps) - math.log2(x)) / (math.log2(y) - math.log2(x))
            return low + max(0.0, part) * (high - low)
    return line[-1][1]


def steps_to(line: Sequence[Place], loss: float) -> float | None:
    """Return the fewest steps of a front to a loss; None: it comes to none so low.

    A loss above that of the first point gives the first point's steps: the grid has no fewer.
    """
    if not line or loss < line[-1][1]:
        return None
    if loss >= line[0][1]:
        return line[0][0]
    for (x, low), (y, high) in pairwise(line):
        if loss >= high:
            part = (loss - low) / (high - low)
            return 2 ** (math.log2(x) + part * (math.log2(y) - math.log2(x)))
    return line[-1][0]


def above(line: Sequence[Place], base: Sequence[Place], part: float | None = None) -> float | None:
    """Return how far a front is above another in loss at equal steps, as a share of the other's loss.

    Args:
        line: The front.
        base: The other.
        part: Where, of the steps that both have, by their logarithm: 0 the fewest, 1 the most. None: where it is the
            farthest above.

    Returns:
        The share. None: one of the fronts is empty.
    """
    if not line or not base:
        return None
    low, high = math.log2(max(line[0][0], base[0][0])), math.log2(max(line[-1][0], base[-1][0]))
    if part is not None:
        return _share(line, base, 2 ** (low + part * (high - low)))
    corners = [2**low, *(steps for steps, _ in [*line, *base] if steps > 2**low)]
    return max(_share(line, base, steps) for steps in corners)


def _share(line: Sequence[Place], base: Sequence[Place], steps: float) -> float:
    one, other = loss_at(line, steps), loss_at(base, steps)
    assert one is not None
    assert other is not None
    return one / other - 1


def mean_above(line: Sequence[Place], base: Sequence[Place], cuts: int = 60) -> float | None:
    """Return the mean of `above` over log steps, by the midpoint rule."""
    shares = [above(line, base, (cut + 0.5) / cuts) for cut in range(cuts)]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def steps_ratio(line: Sequence[Place], base: Sequence[Place], loss: float) -> float | None:
    """Return the steps of a front over those of another to the same loss; None: one of them does not come to it."""
    own, other = steps_to(line, loss), steps_to(base, loss)
    return own / other if own and other else None


def resamples(seeds: Sequence[int]) -> list[tuple[int, ...]]:
    """Return what the bootstrap draws: of at most three seeds all draws with replacement, of more some by chance."""
    if len(seeds) <= 3:
        return list(product(seeds, repeat=len(seeds)))
    chance = random.Random(0)
    return [tuple(chance.choices(seeds, k=len(seeds))) for _ in range(DRAWS)]


def interval(values: Sequence[float | None], share: float = 0.9) -> tuple[float, float] | None:
    """Return the middle share of values; None: some of them are not known."""
    known = sorted(value for value in values if value is not None)
    if not known or len(known) < len(values):
        return None
    left_out = math.floor(len(known) * (1 - share) / 2)
    return known[left_out], known[len(known) - 1 - left_out]
