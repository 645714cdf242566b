"""What a run's config promised, beside what the run came to; told from outside, for a report knows no config."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from distgrow.report.runs import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A run as it may go: gradient evaluations (SFO) without probes, applied updates, last stage, largest batch."""

    sfo: int
    updates: int
    last: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the theory says of ‖∇f‖ ≤ ε, by the constants in the config."""

    epsilon: float
    sfo: tuple[int | None, ...]  #: of each forecast; None: not within the budget
    best_batch: float  #: of all constant batches, the one that needs the least SFO
    best_sfo: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One forecast, or of growth that measures its slowest and its fastest."""

    forecasts: tuple[Forecast, ...]
    after: Mapping[int, int] = field(default_factory=dict)  #: stage → applied samples by its end; empty for two
    target: Target | None = None


#: The plan of a run; None where its config does not tell.
Foresee = Callable[[Record], Planned | None]


def comparison(record: Record, planned: Planned) -> list[list[str]]:
    """Rows of what, planned, actual."""
    forecasts = planned.forecasts
    so_far = "" if record.state == "done" else " so far"
    largest = int(record.steps["batch"].max())
    last = max(event["stage"] for event in record.of("stage"))
    rows = [
        ["SFO of updates", between([forecast.sfo for forecast in forecasts]), f"{record.ledger.applied:,}{so_far}"],
        ["updates", between([forecast.updates for forecast in forecasts]), f"{record.updates:,}{so_far}"],
        ["last stage", between([forecast.last for forecast in forecasts]), f"{last:,}{so_far}"],
        ["largest batch", between([forecast.batch for forecast in forecasts]), f"{largest:,}{so_far}"],
    ]
    return rows if planned.target is None else [*rows, *_of_target(record, planned.target)]


def between(numbers: Sequence[int]) -> str:
    """One number, or the least and the most."""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} – {most:,}"


def _of_target(record: Record, target: Target) -> list[list[str]]:
    """SFO to ‖∇f‖ ≤ ε beside that of the best constant batch."""
    planned, actual = [sfo for sfo in target.sfo if sfo is not None], reached(record, target.epsilon)
    probed = any("norm" in event for event in record.of("probe"))
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
    """SFO, probes left out, when a probe first found ‖∇f‖ ≤ ε; None before that, or where none has measured it."""
    for event in record.of("probe"):
        if isinstance(event.get("norm"), int | float) and event["norm"] <= epsilon:
            return event["sfo"] - event.get("sfo_probe", 0)
    return None
