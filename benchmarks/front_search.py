"""Which runs the benchmark of fronts makes: η of every schedule and batch by a bracket, then seeds of the fronts."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from front_hull import Place, bracket, front, hull
from front_runs import AUTO, DECAYS, Outcome, Runs, Wanted, schedules
from front_tasks import FrontTask

#: What a contestant's name ends with → the metric that it is judged by.
READINGS = {"": "loss", " + average": "average/loss"}
REFERENCE = "linear-decay"  #: the search for other schedules' η begins at its η
DECAY, GROWTH = "tuned decay", "growth"
#: Growth that is held against the decay that it replaces, at the same b₀ and η.
REPLACES = {"seesaw": "cosine", "matched": "linear-decay"}
#: Schedules that run with all seeds at every batch, beside what is on fronts.
ALWAYS = ("constant", *REPLACES.values())
#: Whose fronts with an average are shown, too.
AVERAGED = (AUTO, "matched-30")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Hold one schedule at one batch with its best η, judged by one metric."""

    schedule: str
    reading: str  #: key of READINGS
    batch: int
    exponent: int
    open: str  #: whether the bracket ended at an end of its grid
    runs: Mapping[int, Outcome] = field(default_factory=dict)  #: by seed

    @property
    def losses(self) -> dict[int, float]:
        """Return the loss at the end by seed; inf if it diverged."""
        return {seed: loss_of(outcome, self.reading) for seed, outcome in self.runs.items()}

    def place(self, sample: Sequence[int] | None = None) -> Place:
        """Return the medians of steps and loss over a sample of the seeds; None: over all."""
        seeds = list(self.runs) if sample is None else sample
        updates = statistics.median(self.runs[seed].updates for seed in seeds)
        return float(updates), statistics.median(self.losses[seed] for seed in seeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """Hold the points of a family of contestants, of which the hull is the front."""

    name: str
    points: Sequence[Point]

    def line(self, sample: Sequence[int] | None = None) -> list[Place]:
        """Return the front of the medians over a sample of the seeds, of the points that have run with all seeds."""
        return front([point.place(sample) for point in self.complete])

    def best(self) -> list[Point]:
        """Return the points on the front of the medians, by rising steps."""
        return [self.complete[index] for index in hull([point.place() for point in self.complete])]

    @property
    def seeds(self) -> Sequence[int]:
        """Return the seeds that all points of the front have run with."""
        return sorted(self.complete[0].runs) if self.complete else []

    @property
    def complete(self) -> list[Point]:
        """Return the points that have run with the most seeds."""
        most = max((len(point.runs) for point in self.points), default=0)
        return [point for point in self.points if len(point.runs) == most]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Hold growth and the decay that it replaces, at one b₀ and the decay's best η, by seed."""

    growth: str
    decay: str
    batch: int
    grown: Mapping[int, Outcome]
    decayed: Mapping[int, Outcome]

    def above(self) -> float:
        """Return the median over seeds of how far growth ends above the decay, as a share of the decay's loss."""
        return statistics.median(loss_of(self.grown[s], "") / loss_of(self.decayed[s], "") - 1 for s in self.grown)

    @property
    def steps(self) -> float:
        """Return the median over seeds of growth's updates over the decay's."""
        return statistics.median(self.grown[s].updates / self.decayed[s].updates for s in self.grown)


def loss_of(outcome: Outcome, reading: str) -> float:
    """Return the loss that a contestant is judged by; inf if its run diverged."""
    return outcome.metrics.get(READINGS[reading], math.inf)


class Search:
    """Find the points of a task."""

    def __init__(self, task: FrontTask, runs: Runs) -> None:
        self.task, self.runs = task, runs
        self.refused: dict[str, str] = {}
        self._points: dict[tuple[str, str, int], Point] = {}

    def all(self) -> list[Point]:
        """Return the best η of every schedule at every batch, for each reading, with the first seed."""
        batches = sorted({*self.task.batches, *self.task.starts})
        for reading in READINGS:
            for batch in batches:
                names = list(schedules(self.task, batch, 1.0))
                for name in sorted(names, key=lambda name: name != REFERENCE):
                    self._find(name, reading, batch)
        return list(self._points.values())

    def _find(self, name: str, reading: str, batch: int) -> None:
        begin = self._begin(name, reading, batch)
        if refused := self._first(name, batch, begin).refused:
            self.refused[f"{name}, b = {batch}"] = refused
            return
        found = bracket(
            lambda exponent: loss_of(self._first(name, batch, exponent), reading),
            begin, self.task.lowest, self.task.highest,
        )  # fmt: skip
        outcome = self._first(name, batch, found.best)
        self._points[name, reading, batch] = Point(
            schedule=name, reading=reading, batch=batch, exponent=found.best, open=found.open,
            runs={0: outcome},
        )  # fmt: skip

    def _begin(self, name: str, reading: str, batch: int) -> int:
        """Return the exponent to begin with: the best one of the nearest that is known."""
        for near in ((name, "", batch), (REFERENCE, reading, batch)):
            if near in self._points:
                return self._points[near].exponent
        below = [b for schedule, read, b in self._points if (schedule, read) == (name, reading) and b < batch]
        if not below:
            return self.task.first
        moved = math.log2(batch / max(below)) * self.task.power
        begin = self._points[name, reading, max(below)].exponent + math.floor(moved)
        return min(self.task.highest, max(self.task.lowest, begin))

    def _first(self, name: str, batch: int, exponent: int) -> Outcome:
        return self.runs.get(Wanted(schedule=name, batch=batch, exponent=exponent, seed=0))

    def settle(self) -> list[Point]:
        """Run the points of all fronts, and those that bars compare, with all seeds, until no front has others."""
        while wanting := [point for point in self._on_fronts() if len(point.runs) < self.task.seeds]:
            for point in wanting:
                self._more(point)
        return list(self._points.values())

    def _on_fronts(self) -> list[Point]:
        points = list(self._points.values())
        chosen = {id(p): p for p in points if p.schedule in ALWAYS and not p.reading}
        for family in [*families(points), *kinds(points)]:
            places = [point.place() for point in family.points]
            chosen |= {id(family.points[index]): family.points[index] for index in hull(places)}
        return list(chosen.values())

    def pairs(self) -> list[Pair]:
        """Return growth beside the decays that it replaces, run with all seeds."""
        found: list[Pair] = []
        for growth, decay in REPLACES.items():
            for batch in self.task.starts:
                point = self._points.get((decay, "", batch))
                if point is None or math.isinf(point.place()[1]) or growth not in schedules(self.task, batch, 1.0):
                    continue
                grown = self._seeds(growth, batch, point.exponent)
                if not any(math.isinf(loss_of(outcome, "")) for outcome in grown.values()):
                    found.append(Pair(growth=growth, decay=decay, batch=batch, grown=grown, decayed=point.runs))
        return found

    def _more(self, point: Point) -> None:
        runs = self._seeds(point.schedule, point.batch, point.exponent)
        key = (point.schedule, point.reading, point.batch)
        self._points[key] = Point(
            schedule=point.schedule, reading=point.reading, batch=point.batch, exponent=point.exponent,
            open=point.open, runs=runs,
        )  # fmt: skip

    def _seeds(self, name: str, batch: int, exponent: int) -> dict[int, Outcome]:
        return {
            seed: self.runs.get(Wanted(schedule=name, batch=batch, exponent=exponent, seed=seed))
            for seed in range(self.task.seeds)
        }


def families(points: Iterable[Point]) -> list[Front]:
    """Return the fronts of decays, of growth that does not measure, and of both with an average."""
    points = list(points)
    found = [
        Front(
            name=name + reading, points=[p for p in points if p.reading == reading and (p.schedule in DECAYS) == decays]
        )
        for reading in READINGS
        for name, decays in ((DECAY, True), (GROWTH, False))
    ]
    without = [
        Front(name=family.name, points=[point for point in family.points if point.schedule != AUTO]) for family in found
    ]
    average = [p for p in points if p.schedule == "constant" and p.reading]
    return [each for each in [*without, Front(name="constant η + average", points=average)] if each.points]


def kinds(points: Iterable[Point]) -> list[Front]:
    """Return the front of every schedule, and of some with an average."""
    own: dict[str, list[Point]] = {}
    for point in points:
        if not point.reading or point.schedule in AVERAGED:
            own.setdefault(point.schedule + point.reading, []).append(point)
    return [Front(name=name, points=each) for name, each in own.items()]
