"""What `distgrow plan` prints: the stage table, predictions and every violated constraint."""

import math
from collections import deque
from collections.abc import Callable
from itertools import chain, islice, pairwise

from rich.console import Console
from rich.table import Table

from distgrow.config.run import Run, Theory
from distgrow.core.errors import ConfigError
from distgrow.core.pace import Pace
from distgrow.core.plan import split
from distgrow.core.progress import Progress
from distgrow.engine.spec import DeepSpeed, EngineSpec
from distgrow.growth.controller import Controller
from distgrow.planning.cost import savings
from distgrow.planning.forecast import BOUNDS, Stage, sfo_to_target, stages, turns, unstable
from distgrow.theory import sgd

#: Problems that are told; a plan may have one for each of a million stages.
MOST_PROBLEMS = 10

#: Columns that a table may take: a terminal that has fewer wraps its lines, but no number is cut short.
WIDTH = 400

NOT_SGD = "theory: its bound is one of SGD without momentum; nothing is predicted for this optimizer"

PROBED = "run.probe's evaluations are charged to budget.sfo: there will be fewer updates than are shown"

AUTO = "engine.max_micro=auto: shown as if memory held every share; it is measured when the run begins"


def warn(run: Run, world: int | None = None, stands_at: Callable[[], Progress] = Progress) -> None:
    """Check that the run can go on from `stands_at()`; print a warning if it would pass a known stability limit.

    Raises:
        ConfigError: The run cannot be carried out.
    """
    controller = run.controller(world)
    check_probes(run, controller)
    controller.check_resumed(stands_at)
    if (given := run.applicable_theory()) is not None:
        for stage in stages(controller, soonest=True):
            for problem in unstable(given, controller, stage):
                Console(stderr=True, highlight=False, soft_wrap=True).print(f"warning: {problem}", markup=False)
                return


def show(run: Run, world: int | None, rows: int, pace: Pace | None = None) -> bool:
    """Print the table to standard output, problems to standard error; whether the plan can be carried out.

    It is for `world` ranks, or for those that each stage wants; with a `pace` it tells what that takes.
    Only the first and last stages are shown where there are more than `rows`; all are computed and checked.
    Of adaptive growth there are two tables, the bounds of what may come.
    """
    controller, console = run.controller(world), Console(width=WIDTH, highlight=False)
    given = run.applicable_theory()
    problems = told(given, controller)
    try:
        check_probes(run, controller)
    except ConfigError as error:
        problems.append(str(error))
    for title, soonest in BOUNDS if controller.growth.adaptive else (("", False),):
        if title:
            console.print(f"{controller.growth.name} growth {title}")
        for line in [
            *_bound(controller, soonest, rows),
            *([] if problems else communication(run.engine, controller, soonest=soonest)),
            *predictions(given, controller, soonest=soonest),
            *(savings(controller, pace, soonest=soonest) if pace is not None else []),
        ]:
            console.print(line)
    for line in [
        *controller.growth.remarks(),
        *([AUTO] if run.engine.max_micro == "auto" else []),
        *([NOT_SGD] if given is not run.theory else []),
        *([PROBED] if run.run.probe.every_epochs is not None and run.budget.sfo is not None else []),
    ]:
        console.print(line)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    for problem in problems:
        errors.print(f"distgrow: {problem}", markup=False)
    return not problems


def check_probes(run: Run, controller: Controller) -> None:
    """ConfigError where exact probes cannot be; those of a data set of their own are looked at by `train` alone."""
    if run.task.kind == "target":
        return
    run.run.probe.check(controller.epoch, controller.world, controller.epoch, controller.budget.sfo)


def told(given: Theory | None, controller: Controller) -> list[str]:
    """The first problems of the run to come."""
    found = (problem for at in controller.reach() for problem in controller.problems(*at))
    rates = (problem for stage in stages(controller, soonest=True) for problem in unstable(given, controller, stage))
    return list(dict.fromkeys(islice(chain(found, rates), MOST_PROBLEMS)))


def _bound(controller: Controller, soonest: bool, rows: int) -> list[Table | str]:
    """The table of the run to come, and its sums."""
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
    return [_table(controller, head, list(tail), count), _total(controller, last, count), *_probes(controller, last)]


def _table(controller: Controller, head: list[Stage], tail: list[Stage], count: int) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("stage", "epochs", "samples", "steps", "batch", "world × micro × accum", "lr", "SFO after"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in head:
        table.add_row(*_row(controller, stage))
    if hidden := count - len(head) - len(tail):
        table.add_row(f"… {hidden:,} more")
    for stage in tail:
        table.add_row(*_row(controller, stage))
    return table


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
        f"{stage.first_sample / controller.epoch:,.2f} – {last_sample / controller.epoch:,.2f}",
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
        f"{count:,} stages, {steps:,} updates, {sfo:,} gradient evaluations; "
        f"at constant batch {controller.growth.start:,}: {constant:,} updates ({constant / steps:.1f} ×)"
    )


def _probes(controller: Controller, last: Stage) -> list[str]:
    """What exact measurements of ‖∇f‖ add, where growth goes by them."""
    count = controller.growth.probes(last.first_step + last.steps, last.stage)
    if count == 0:
        return []
    evaluations = f"and {count:,} probes of ‖∇f‖: {count * controller.epoch:,} gradient evaluations more"
    fewer = ", which budget.sfo leaves for fewer updates than are shown" if controller.budget.sfo else ""
    return [evaluations + fewer]


def communication(engine: EngineSpec, controller: Controller, *, soonest: bool) -> list[str]:
    """What accumulation costs where ZeRO has to reduce every micro-batch."""
    if not isinstance(engine, DeepSpeed) or engine.zero == 1:
        return []
    shares = {(batch, controller.ranks(stage)) for stage, batch, _ in controller.outline(Progress(), soonest=soonest)}
    most = max(split(batch, ranks, controller.max_micro)[1] for batch, ranks in shares)
    if most == 1:
        return []
    return [f"ZeRO {engine.zero} reduces every micro-batch: up to {most} reductions an update; zero=1 needs one"]


def predictions(given: Theory | None, controller: Controller, *, soonest: bool) -> list[str]:
    """Predicted SFO to ‖∇f‖ ≤ ε against the best constant batch at the base learning rate (sgd.py)."""
    if given is None:
        return []
    constants, lr, epsilon = given.constants(), controller.lr.base, given.epsilon
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
