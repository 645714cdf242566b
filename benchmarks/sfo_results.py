"""What a run of the SFO benchmark came to, kept one JSON line a run: running minima, batches, last and best values."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from sfo_names import policy_today

Point = tuple[int, int, float]  #: applied updates, gradient evaluations, value
REACHED_NEVER = (math.inf, math.inf)
TIMINGS = 64  #: updates of one batch whose seconds are kept, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The model at one place of a run; exact over the whole training set, NaN where there is no such thing."""

    grad_norm: float  #: ‖∇f‖, of the loss that is minimised, an L2 penalty included
    loss: float  #: training loss without the penalty
    held_loss: float = math.nan  #: mean loss over held-out samples
    accuracy: float = math.nan  #: share of held-out samples that are told rightly

    @property
    def finite(self) -> bool:
        """Return whether ‖∇f‖ and loss are finite."""
        return math.isfinite(self.grad_norm) and math.isfinite(self.loss)


@dataclass(slots=True)
class Minima:
    """A value's running minimum: where it first reached each target, and between them a point every 2 %."""

    targets: Sequence[float] = ()
    lowest: float = math.inf
    points: list[Point] = field(default_factory=list)

    def news(self, value: float) -> bool:
        """Return whether a value is kept as a point."""
        kept = self.points[-1][2] if self.points else math.inf
        return value <= 0.98 * kept or any(value <= target < self.lowest for target in self.targets)

    def add(self, step: int, sfo: int, value: float) -> None:
        """Add a value."""
        if self.news(value):
            self.points.append((step, sfo, value))
        self.lowest = min(self.lowest, value)


@dataclass(slots=True)
class Course:
    """What is kept of a run while it is watched."""

    grad_norm: Minima = field(default_factory=Minima)
    held_loss: Minima = field(default_factory=Minima)
    stretches: list[tuple[int, int]] = field(default_factory=list)  #: (batch, updates of it in a row)
    seconds: dict[int, list[float]] = field(default_factory=dict)  #: of single updates, by batch
    steps: int = 0
    sfo: int = 0
    last: Reading | None = None
    best: dict[str, float] = field(default_factory=dict)  #: lowest losses and highest accuracy of all readings

    def updated(self, batch: int, updates: int = 1, seconds: float | None = None) -> None:
        """Record `updates` more applied updates of `batch` samples."""
        self.steps += updates
        if self.stretches and self.stretches[-1][0] == batch:
            self.stretches[-1] = (batch, self.stretches[-1][1] + updates)
        else:
            self.stretches.append((batch, updates))
        if seconds is not None and len(kept := self.seconds.setdefault(batch, [])) < TIMINGS:
            kept.append(seconds)

    def read(self, sfo: int, reading: Reading) -> None:
        """Record a reading of the model after `sfo` gradient evaluations."""
        self.sfo, self.last = sfo, reading
        self.grad_norm.add(self.steps, sfo, reading.grad_norm)
        self.held_loss.add(self.steps, sfo, reading.held_loss)
        for name, better in (("grad_norm", min), ("loss", min), ("held_loss", min), ("accuracy", max)):
            value = getattr(reading, name)
            if math.isfinite(value):
                self.best[name] = better(self.best.get(name, value), value)

    def reached(self, grad_norm: float | None) -> bool:
        """Whether ‖∇f‖ has been as low as `grad_norm`; never where that is None."""
        return grad_norm is not None and self.grad_norm.lowest <= grad_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run, whole."""

    problem: str  #: key of the task
    policy: str
    setting: str  #: which member of the policy's grid
    seed: int
    key: str  #: of everything that decides what the run computes
    config: Mapping[str, Any]
    epoch: int  #: samples of the training set
    ending: str  #: done, arrived (at the last target), at its floor (where it is constant) or diverged
    steps: int
    sfo: int
    stretches: Sequence[tuple[int, int]]
    grad_norm: Sequence[Point]
    held_loss: Sequence[Point]
    last: Mapping[str, float | None]
    best: Mapping[str, float]
    timings: Sequence[tuple[int, int, float]] = ()  #: (batch, updates, median seconds of one)
    seconds: float = 0.0  #: of the whole run on the wall, measurements included
    hardware: str = ""
    made: str = ""  #: commit and date

    def crossing(self, measure: str, target: float) -> tuple[float, float]:
        """(SFO, steps) at which the running minimum of `measure` first was at most `target`; inf where it never was."""
        points: Sequence[Point] = getattr(self, measure)
        return next(((sfo, step) for step, sfo, value in points if value <= target), REACHED_NEVER)

    def stretches_to(self, step: float) -> list[tuple[int, int]]:
        """The run's (batch, updates) up to an update."""
        kept: list[tuple[int, int]] = []
        for batch, updates in self.stretches:
            if step > 0:
                kept.append((batch, int(min(updates, step))))
            step -= updates
        return kept

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the result whose asdict was written as JSON. Old names of policies become today's."""
        lists = ("stretches", "grad_norm", "held_loss", "timings")
        made = {**values, **{name: [tuple(item) for item in values[name]] for name in lists}}
        return cls(**{**made, "policy": policy_today(values["policy"])})


def provenance(results: Iterable[Result]) -> str:
    """Commits and dates of runs, with the policies of each where there are several."""
    made: dict[str, dict[str, None]] = {}
    for result in results:
        made.setdefault(result.made or "unknown commit", {})[result.policy] = None
    if len(made) == 1:
        return next(iter(made))
    return "; ".join(f"{when} ({', '.join(policies)})" for when, policies in made.items())


def result_of(course: Course, *, hardware: str, **facts: Any) -> Result:
    """Return the finished course as a line of results."""
    last = asdict(course.last) if course.last else {}
    return Result(
        steps=course.steps,
        sfo=course.sfo,
        stretches=course.stretches,
        grad_norm=course.grad_norm.points,
        held_loss=course.held_loss.points,
        last={name: value if math.isfinite(value) else None for name, value in last.items()},
        best=course.best,
        timings=[(batch, len(each), float(np.median(each))) for batch, each in course.seconds.items()],
        hardware=hardware,
        **facts,
    )


def key_of(*parts: Any) -> str:
    """Return a short hash of plain values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """Results in a JSONL file; a line that a kill has torn is dropped, so that its run is made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = [Result.from_dict(json.loads(line)) for line in whole_lines(path)]
        self._keys = {result.key for result in self.results}

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, result: Result) -> None:
        """Append a run."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result), allow_nan=False, ensure_ascii=False) + "\n")
        self.results.append(result)
        self._keys.add(result.key)


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file, after its last one has been cut off if a kill has torn it. Make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if len("".join(whole)) < len(text):
        path.write_text("".join(whole), encoding="utf-8")
    return whole


# ── over seeds and settings ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Quartiles:
    """A median with its quartiles; inf where a run never arrived counts as later than every other."""

    low: float
    median: float
    high: float


def quartiles(values: Iterable[float]) -> Quartiles:
    """Linearly interpolated quartiles, which may be inf; NaN for no values."""
    ordered = sorted(values)
    if not ordered:
        return Quartiles(low=math.nan, median=math.nan, high=math.nan)
    low, median, high = (_quantile(ordered, share) for share in (0.25, 0.5, 0.75))
    return Quartiles(low=low, median=median, high=high)


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below, part = ordered[math.floor(place)], place % 1
    return below if part == 0 else (1 - part) * below + part * ordered[math.floor(place) + 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The runs of one setting of a policy, one a seed."""

    policy: str
    name: str
    runs: Sequence[Result]

    def sfo(self, measure: str, target: float) -> Quartiles:
        """Gradient evaluations to a target."""
        return quartiles(run.crossing(measure, target)[0] for run in self.runs)

    def steps(self, measure: str, target: float) -> Quartiles:
        """Serial steps to a target."""
        return quartiles(run.crossing(measure, target)[1] for run in self.runs)

    def rank(self, measure: str, target: float) -> tuple[float, float]:
        """Less is better: median gradient evaluations, then median steps."""
        return self.sfo(measure, target).median, self.steps(measure, target).median

    def last(self, name: str) -> Quartiles:
        """A value of the last reading."""
        return quartiles(value for run in self.runs if (value := run.last.get(name)) is not None)

    def best(self, name: str) -> Quartiles:
        """A value of the best reading."""
        return quartiles(run.best[name] for run in self.runs if name in run.best)


def settings(results: Iterable[Result]) -> list[Setting]:
    """Results by policy and setting, in order of appearance."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.policy, result.setting), []).append(result)
    return [Setting(policy=policy, name=name, runs=runs) for (policy, name), runs in groups.items()]


def best_setting(among: Sequence[Setting], measure: str, target: float) -> Setting | None:
    """The setting that needs the fewest gradient evaluations to a target, of those run with the most seeds."""
    seeds = max((len(setting.runs) for setting in among), default=0)
    arrived = [s for s in among if len(s.runs) == seeds and math.isfinite(s.rank(measure, target)[0])]
    return min(arrived, key=lambda setting: setting.rank(measure, target), default=None)


def finalists(among: Sequence[Setting], measure: str, targets: Sequence[float]) -> list[Setting]:
    """Return the settings to run with more seeds: for each target those of fewest evaluations and of fewest steps."""
    chosen: dict[str, Setting] = {}
    for target in targets:
        ranked = [(setting.rank(measure, target), setting) for setting in among]
        arrived = [(rank, setting) for rank, setting in ranked if math.isfinite(rank[0])]
        for by in (0, 1):
            for _, setting in sorted(arrived, key=lambda pair, by=by: (pair[0][by], pair[0]))[:1]:
                chosen[setting.name] = setting
    return list(chosen.values())
