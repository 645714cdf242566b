"""What published and own claims come to on measured fronts: each bar is met or missed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from front_hull import Place, above, interval, resamples, steps_ratio
from front_search import DECAY, Front, Pair, Point, families, kinds
from paired import Report

#: Growth at constant η.
HELD = ("matched", "matched-30", "late", "exponential", "linear", "optimal")
LOSS, STEPS = 0.01, 0.6  #: of auto: at most so far above tuned decay, and so many of its steps at the few-steps end
PAIRS = {"seesaw": (0.003, 0.64), "matched": (0.003, 0.56)}  #: most that the loss is above, most steps over the decay's
FEWER = 0.7  #: of the smallest constant batch's steps

Seeded = Callable[[Sequence[int] | None], float | None]  #: a value of the medians over a sample of seeds, or over all


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Hold one claim and what was measured."""

    claim: str
    measured: str
    met: bool | None  #: None: nothing to compare

    @property
    def row(self) -> list[str]:
        """Return a row of the table."""
        return [self.claim, self.measured, "—" if self.met is None else "met" if self.met else "missed"]


def bars(points: Sequence[Point], pairs: Sequence[Pair]) -> Report:
    """Return the table of all bars."""
    base = next((each for each in families(points) if each.name == DECAY), None)
    own = {each.name: each for each in kinds(points)}
    found: list[Bar] = []
    for name in ("auto", "matched-30"):
        if base is not None and base.line() and name in own and own[name].line():
            found += [_nowhere_above(own[name], base), _fewer_steps(own[name], base)]
    found += [_as_good(name, [pair for pair in pairs if pair.growth == name]) for name in PAIRS]
    if "constant" in own and own["constant"].line():
        found.append(_lower(own["constant"], [point for point in points if not point.reading]))
    return Report(
        title="Bars", columns=["claim", "measured", "bar"], rows=[bar.row for bar in found if bar is not None]
    )


def _nowhere_above(line: Front, base: Front) -> Bar:
    value: Seeded = lambda sample: above(line.line(sample), base.line(sample))  # noqa: E731
    worst = value(None)
    return Bar(
        claim=f"`{line.name}` is nowhere more than {100 * LOSS:g} % above tuned decay in loss at equal steps",
        measured=f"at most {percent(value, line.seeds)}",
        met=None if worst is None else worst <= LOSS,
    )


def _fewer_steps(line: Front, base: Front) -> Bar:
    value: Seeded = lambda sample: end_ratio(line.line(sample), base.line(sample))  # noqa: E731
    ratio, edge = value(None), line.line()[0][1] > base.line()[0][1]
    least = "at least " if edge else ""  # a larger constant batch than the grid has may come to it in fewer steps
    return Bar(
        claim=f"`{line.name}` takes at most {STEPS:g} × tuned decay's steps at equal loss, at its few-steps end",
        measured=least + times(value, line.seeds),
        met=None if ratio is None or (edge and ratio <= STEPS) else ratio <= STEPS,
    )


def end_ratio(line: Sequence[Place], base: Sequence[Place]) -> float | None:
    """Return the steps over those of another front at the loss of the first point."""
    return steps_ratio(line, base, line[0][1]) if line else None


def _as_good(name: str, pairs: Sequence[Pair]) -> Bar:
    loss, steps = PAIRS[name]
    decay = pairs[0].decay if pairs else "decay"
    held = [pair for pair in pairs if pair.above() <= loss and pair.steps <= steps]
    each = ", ".join(f"{100 * pair.above():+.2f} % at {pair.steps:.2f} (b₀ = {pair.batch})" for pair in pairs)
    return Bar(
        claim=f"`{name}` ends at most {100 * loss:g} % above its {decay} of the same b₀ and η, in at most {steps:g} of "
        "its steps",
        measured=f"at {len(held)} of {len(pairs)} b₀: {each}" if pairs else "—",
        met=len(held) == len(pairs) if pairs else None,
    )


def _lower(constant: Front, points: Sequence[Point]) -> Bar:
    line = [point.place() for point in constant.complete]
    most, least = max(steps for steps, _ in line), min(loss for _, loss in line)
    grown = [point for point in points if point.schedule in HELD and sorted(point.runs) == constant.seeds]
    few = [point for point in grown if point.place()[0] <= FEWER * most]
    best = min(few, key=lambda point: point.place()[1], default=None)
    claim = (
        f"growth at constant η ends lower than every constant batch at constant η, in {100 * (1 - FEWER):g} % fewer "
        "steps than the smallest"
    )
    if best is None:
        return Bar(claim=claim, measured="—", met=None)
    steps, loss = best.place()
    measured = (
        f"`{best.schedule}`, b₀ = {best.batch}: {100 * (loss / least - 1):+.2f} % in {steps / most:.2f} of its steps"
    )
    return Bar(claim=claim, measured=measured, met=loss < least)


# ── values and their intervals ──────────────────────────────────────────────────────────────────────────────────


def percent(value: Seeded, seeds: Sequence[int]) -> str:
    """Return a share in per cent, with its interval."""
    return _spread(value, seeds, lambda share: f"{100 * share:+.2f}", " %")


def times(value: Seeded, seeds: Sequence[int]) -> str:
    """Return a ratio, with its interval."""
    return _spread(value, seeds, lambda ratio: f"{ratio:.2f}", "")


def _spread(value: Seeded, seeds: Sequence[int], shown: Callable[[float], str], unit: str) -> str:
    middle = value(None)
    if middle is None:
        return "—"
    ends = interval([value(sample) for sample in resamples(seeds)]) if len(seeds) > 1 else None
    return f"{shown(middle)}{unit}" + (f" ({shown(ends[0])} … {shown(ends[1])})" if ends else "")
