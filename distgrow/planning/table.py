"""Text of `distgrow plan`: the table of stages, predictions, costs and every violated constraint."""

import math
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise

from rich.console import Console
from rich.table import Table

from distgrow.config.run import Run, Theory
from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.core.pace import Pace
from distgrow.core.plan import split
from distgrow.core.progress import Progress
from distgrow.engine.ability import Can
from distgrow.engine.spec import EngineSpec
from distgrow.growth.at_growth import optimizer_plan
from distgrow.growth.branch_decisions import branches_bound
from distgrow.growth.controller import Controller
from distgrow.optim import OptimizerSpec
from distgrow.planning.check import problems
from distgrow.planning.cost import costed_world, fastest, savings
from distgrow.planning.cost_table import by_stage, constant_batches
from distgrow.planning.forecast import BOUNDS, Stage, sfo_to_target, stages, turns
from distgrow.planning.remarks import remarks
from distgrow.theory import sgd

#: Columns that a table may take. A narrower terminal wraps its lines, but no number is cut short.
WIDTH = 400

#: Headings of the table. They and a common run fit 80 columns.
HEADINGS = ("stage", "until\nepoch", "samples", "steps", "batch", "world ×\nmicro × accum", "lr", "SFO\nafter")


def show(
    run: Run,
    world: int | None,
    rows: int,
    pace: Pace | None = None,
    scale: float | None = None,
    price: float | None = None,
) -> bool:
    """Print the plan to standard output, and its problems to standard error.

    Of adaptive growth there are two tables, the bounds of what the run may do.

    Args:
        run: The run.
        world: Number of ranks. If None, each stage has the number that it wants.
        rows: Most rows of a table: the first and the last stages. All stages are computed and checked.
        pace: Speed of a worker. If given, seconds and worker-seconds are printed too.
        scale: Noise scale of the gradient. If given too, so is the fastest batch.
        price: Of a worker for an hour. If given too, so is what the run costs.

    Returns:
        Whether the run can be carried out.
    """
    controller, paid_for = run.controller(world), run.controller(costed_world(run, world, pace))
    violated = problems(run, controller)
    tables, text = Console(width=WIDTH, highlight=False), Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    for title, soonest in BOUNDS if controller.growth.adaptive else (("", False),):
        if title:
            text.print(f"{controller.growth.name} growth {title}")
        table, sums = _bound(controller, run.optimizer, soonest, rows, _headings(run))
        tables.print(table)
        cut = [] if violated else of_micro_batches(run.engine, controller, soonest=soonest)
        late = run.engine.delay > 0 or Can.REPEAT not in run.engine.can
        theory = None if late or run.open_rate else run.applicable_theory()
        predicted = predictions(theory, controller, soonest=soonest)
        costs = _costs(paid_for, pace, scale, price, rows, soonest)
        _print(text, [*sums, *cut, *predicted, *costs])
    _print(text, remarks(run, controller))
    _print(Console(stderr=True, highlight=False, soft_wrap=True), [f"distgrow: {problem}" for problem in violated])
    return not violated


def _costs(
    controller: Controller, pace: Pace | None, scale: float | None, price: float | None, rows: int, soonest: bool
) -> list[str]:
    """Return the seconds of the plan and the fastest batch, if the pace is known."""
    if pace is None:
        return []
    known = (controller, pace, scale)
    return [
        *fastest(*known, soonest=soonest),
        *constant_batches(*known, price, soonest=soonest),
        *by_stage(*known, price, rows, soonest=soonest),
        *savings(controller, pace, price, soonest=soonest),
    ]


def _print(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, markup=False)


def _headings(run: Run) -> list[str]:
    """Return the headings of the table; rates are multiples of lr.base if that is not known."""
    return ["lr ÷\nlr.base" if name == "lr" and run.open_rate else name for name in HEADINGS]


def _bound(
    controller: Controller, optimizer: OptimizerSpec, soonest: bool, rows: int, headings: Sequence[str]
) -> tuple[Table, list[str]]:
    """Return the table of the stages, and its sums."""
    head: list[Stage] = []
    tail: deque[Stage] = deque(maxlen=max(1, rows // 4))
    count = 0
    for stage in stages(controller, soonest=soonest):
        count += 1
        if len(head) < rows - rows // 4:
            head.append(stage)
        else:
            tail.append(stage)
    last = [*head, *tail][-1]
    sums = [_total(controller, last, count), *_probes(controller, last)]
    return _table(controller, optimizer, head, list(tail), count, headings), sums


def _table(
    controller: Controller,
    optimizer: OptimizerSpec,
    head: list[Stage],
    tail: list[Stage],
    count: int,
    headings: Sequence[str],
) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in (*headings, *_settings(controller, optimizer, head[0])):
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for stage in head:
        table.add_row(*_row(controller, stage), *_settings(controller, optimizer, stage).values())
    if hidden := count - len(head) - len(tail):
        table.add_row(f"… {hidden:,} more")
    for stage in tail:
        table.add_row(*_row(controller, stage), *_settings(controller, optimizer, stage).values())
    return table


def _settings(controller: Controller, optimizer: OptimizerSpec, stage: Stage) -> dict[str, str]:
    """Return the density, and the optimizer's settings that follow the batch as they are at the first update."""
    plan = optimizer_plan(controller.at_growth, controller.growth, controller.lr, stage.progress(0), stage.batch)
    own = {name.replace("_", "\n"): f"{value:.5g}" for name, value in optimizer.at(plan).items()}
    return _densities(controller, stage) | own


def _densities(controller: Controller, stage: Stage) -> dict[str, str]:
    """Return active experts and density at the stage's first and last update; nothing if the model is dense."""
    sparsity, weights, axis, found = controller.sparsity, controller.weights, controller.whole_axis, dict[str, str]()
    ends = [stage.progress(step) for step in (0, stage.steps - 1)]
    if weights is not None:
        found["active"] = _range(f"{weights.active.at(progress, axis)}" for progress in ends)
    if sparsity is not None or weights is not None:
        shares = [1.0 if weights is None else weights.at(progress, axis) for progress in ends]
        left = [1.0 if sparsity is None else sparsity.planned(p, stage.batch, axis.samples) for p in ends]
        found["density"] = _range(f"{one * other:.4g}" for one, other in zip(left, shares, strict=True))
    return found


def _range(values: Iterable[str]) -> str:
    return " – ".join(dict.fromkeys(values))


def _row(controller: Controller, stage: Stage) -> list[str]:
    last_sample, ranks = stage.first_sample + stage.samples, controller.ranks(stage.stage)
    try:
        micro, accum = split(stage.batch, ranks, controller.max_micro)
        shape = f"{ranks:,} × {micro:,} × {accum:,}"
    except ConfigError:
        shape = "—"
    rates = [controller.rate(stage.progress(step), stage.batch) for step in turns(controller, stage)]
    shown = rates[:1] + [now for before, now in pairwise(rates) if not math.isclose(before, now)]
    return [
        f"{stage.stage:,}",
        f"{last_sample / controller.epoch:,.2f}",
        f"{stage.samples:,}",
        f"{stage.steps:,}",
        f"{stage.batch:,}",
        shape,
        " – ".join(f"{rate:.4g}" for rate in shown),
        f"{last_sample:,}",
    ]


def _total(controller: Controller, last: Stage, count: int) -> str:
    sfo, steps = last.first_sample + last.samples, last.first_step + last.steps
    constant = -(-sfo // controller.growth.start)
    return (
        f"{counted(count, 'stage')}, {counted(steps, 'update')}, {counted(sfo, 'gradient evaluation')}; at constant "
        f"batch {controller.growth.start:,}: {counted(constant, 'update')} ({constant / steps:.1f} ×)"
    )


def _probes(controller: Controller, last: Stage) -> list[str]:
    """Return the cost of the exact measurements of ‖∇f‖, or of the branches, that growth needs, if it needs any."""
    if (bound := branches_bound(controller, last.first_sample + last.samples)) is not None:
        return [f"and branches that do not go on: at most {counted(bound, 'gradient evaluation')} more"]
    count = controller.probe_count(last.first_step + last.steps, last.stage)
    if count == 0:
        return []
    evaluations = (
        f"and {counted(count, 'probe')} of ‖∇f‖: {counted(count * controller.epoch, 'gradient evaluation')} more"
    )
    fewer = ", which budget.sfo leaves for fewer updates than are shown" if controller.budget.sfo else ""
    return [evaluations + fewer]


def of_micro_batches(engine: EngineSpec, controller: Controller, *, soonest: bool) -> list[str]:
    """Return what the engine has to say of the micro-batches that the plan comes to."""
    shares = {(batch, controller.ranks(stage)) for stage, batch, _ in controller.outline(Progress(), soonest=soonest)}
    sizes = [split(batch, ranks, controller.max_micro) for batch, ranks in shares]
    return engine.remarks(sorted({micro for micro, _ in sizes}), max(accum for _, accum in sizes))


def predictions(theory: Theory | None, controller: Controller, *, soonest: bool) -> list[str]:
    """Return the predicted SFO to ‖∇f‖ ≤ ε, and that of the best constant batch at the base learning rate (sgd.py)."""
    if theory is None:
        return []
    constants, lr, epsilon = theory.constants(), controller.lr.initial, theory.epsilon
    if lr >= constants.stable_lr():
        return []
    try:
        best, at = sgd.least_sfo(constants, lr, epsilon), sgd.critical_batch(constants, lr, epsilon)
        reached = sfo_to_target(constants, controller, epsilon, soonest=soonest)
        ours = "not within the budget" if reached is None else f"{reached:,} ({reached / best:.2f} × the best constant)"
        updates = f"{best / at:,.0f}"
    except (ArithmeticError, ValueError):
        return ["theory: its constants lead beyond the numbers that a computer has; nothing is predicted"]
    return [
        f"predicted SFO to ‖∇f‖ ≤ {epsilon:g}: {ours}",
        f"best constant batch at lr {lr:g}: b* = {at:,.1f}, {best:,.0f} gradient evaluations, {updates} updates",
    ]
