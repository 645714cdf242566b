"""What overhead.py has measured, and its tables."""

from dataclasses import dataclass

from loops import Model
from paired import Report, Spread

SHAPE = "world × micro × accum"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Seconds per update of distgrow over those of the bare loops."""

    model: Model
    engine: str
    world: int
    micro: int
    accum: int
    bare_us: float
    distgrow_us: float
    over_bare: Spread
    over_logging: Spread
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """Time of the first update of a stage beyond the stage's median update, as a fraction of that."""

    model: Model
    world: int
    batches: list[int]
    distgrow: Spread
    bare: Spread


def reports(rows: list[Overhead | Transition]) -> list[Report]:
    """Return the tables that have rows."""
    overheads = [row for row in rows if isinstance(row, Overhead)]
    transitions = [row for row in rows if isinstance(row, Transition)]
    tables = [
        Report(
            title="Time per update, distgrow over a hand-written loop: median of paired ratios (quartiles)",
            columns=["model", "engine", SHAPE, "bare µs", "distgrow µs", "÷ bare", "target", "÷ logging"],
            rows=[overhead_cells(row) for row in overheads],
        ),
        Report(
            title="First update of a new stage beyond the stage's median update, in updates: median (quartiles)",
            columns=["model", "processes", "batches", "distgrow", "bare loop, same batches", "target"],
            rows=[transition_cells(row) for row in transitions],
        ),
    ]
    return [table for table in tables if table.rows]


def overhead_cells(row: Overhead) -> list[str]:
    """Return a row of the first table."""
    return [
        row.model.upper(),
        row.engine,
        f"{row.world} × {row.micro} × {row.accum}",
        f"{row.bare_us:,.0f}",
        f"{row.distgrow_us:,.0f}",
        str(row.over_bare),
        f"≤ {row.limit:.2f} {'met' if row.over_bare.median <= row.limit else 'missed'}",
        str(row.over_logging),
    ]


def transition_cells(row: Transition) -> list[str]:
    """Return a row of the second table."""
    return [
        row.model.upper(),
        str(row.world),
        " → ".join(map(str, row.batches)),
        str(row.distgrow),
        str(row.bare),
        f"< 1 {'met' if row.distgrow.median < 1 else 'missed'}",
    ]
