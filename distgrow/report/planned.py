"""What a run's config promised beside what the run came to; the plan is given, for a report knows no config."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from distgrow.report.runs import Record
from distgrow.tracking.events import GradientProbe
from distgrow.tracking.pace import duration


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Hold a run as it may go."""

    sfo: int  #: gradient evaluations without probes
    updates: int  #: applied ones
    last: int  #: the last stage
    batch: int  #: the largest


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Hold what the theory says of ‖∇f‖ ≤ ε, by the constants in the config."""

    epsilon: float
    sfo: tuple[int | None, ...]  #: of each forecast; None: not within the budget
    best_batch: float  #: of all constant batches, the one that needs the least SFO
    best_sfo: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """Hold what another schedule would probably come to with the same budget."""

    name: str
    loss: float  #: at its end
    low: float  #: lower end of the interval of 90 %
    high: float
    updates: int
    batch: int  #: the largest
    seconds: float | None = None  #: None: the pace is not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Hold one forecast, or the slowest and the fastest of growth that measures."""

    forecasts: tuple[Forecast, ...]
    after: Mapping[int, int] = field(default_factory=dict)  #: stage → applied samples by its end; empty for two
    target: Target | None = None
    prospects: tuple[Prospect, ...] = ()  #: of other schedules, the best first


#: Returns the plan of a run, or None if its config does not hold one.
Foresee = Callable[[Record], Planned | None]


def comparison(record: Record, planned: Planned) -> list[list[str]]:
    """Return rows of what, planned, actual."""
    forecasts = planned.forecasts
    so_far = "" if record.state == "done" else " so far"
    largest = int(record.steps["batch"].max())
    last = int(record.steps["stage"].max())
    rows = [
        ["SFO of updates", between([forecast.sfo for forecast in forecasts]), f"{record.ledger.applied:,}{so_far}"],
        ["updates", between([forecast.updates for forecast in forecasts]), f"{record.updates:,}{so_far}"],
        ["last stage", between([forecast.last for forecast in forecasts]), f"{last:,}{so_far}"],
        ["largest batch", between([forecast.batch for forecast in forecasts]), f"{largest:,}{so_far}"],
    ]
    return rows if planned.target is None else [*rows, *_of_target(record, planned.target)]


def prospects(planned: Planned) -> list[list[str]]:
    """Return rows of schedule, loss, interval, updates and seconds."""
    return [
        [
            each.name,
            f"{each.loss:.4g}",
            f"{each.low:.4g} – {each.high:.4g}",
            f"{each.updates:,}",
            "—" if each.seconds is None else duration(each.seconds),
        ]
        for each in planned.prospects
    ]


def between(numbers: Sequence[int]) -> str:
    """Return one number, or the least and the most."""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} – {most:,}"


def _of_target(record: Record, target: Target) -> list[list[str]]:
    """Return rows of the SFO to ‖∇f‖ ≤ ε beside that of the best constant batch."""
    planned, actual = [sfo for sfo in target.sfo if sfo is not None], reached(record, target.epsilon)
    probed = bool(record.of(GradientProbe))
    rows = [
        [
            f"SFO to ‖∇f‖ ≤ {target.epsilon:g}",
            between(planned) if planned else "not in the budget",
            f"≤ {actual:,}" if actual is not None else "not reached" if probed else "not measured",
        ],
        [f"SFO at the best constant batch, {target.best_batch:,.1f}", f"{target.best_sfo:,.0f}", "—"],
    ]
    ratios = [f"{sfo / target.best_sfo:,.2f} ×" if sfo else "—" for sfo in (min(planned, default=None), actual)]
    return [*rows, ["times the best constant's", *ratios]]


def reached(record: Record, epsilon: float) -> int | None:
    """Return the SFO without probes when a probe first found ‖∇f‖ ≤ ε, or None if none has."""
    for probe in record.of(GradientProbe):
        if probe.norm is not None and probe.norm <= epsilon:
            return (probe.sfo or 0) - (probe.sfo_probe or 0)
    return None
