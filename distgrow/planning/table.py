"""Text of `distgrow plan`: the table of stages, predictions, costs and every violated constraint."""

import math
import sys
from collections import deque
from collections.abc import Iterable
from itertools import pairwise

from rich.console import Console
from rich.table import Table

from distgrow.config.run import Run, Theory
from distgrow.core.errors import ConfigError
from distgrow.core.pace import Pace
from distgrow.core.plan import split
from distgrow.core.progress import Progress
from distgrow.engine.asynchronous.spec import Async
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.spec import DeepSpeed, EngineSpec
from distgrow.growth.at_growth import optimizer_plan
from distgrow.growth.branch_decisions import branches_bound
from distgrow.growth.controller import Controller
from distgrow.growth.draws import draws_size
from distgrow.growth.no_growth import no_growth
from distgrow.optim import OptimizerSpec
from distgrow.planning.check import problems
from distgrow.planning.cost import fastest, savings
from distgrow.planning.forecast import BOUNDS, Stage, sfo_to_target, stages, turns
from distgrow.theory import sgd, staleness
from distgrow.theory.pruning import pruned_samples

#: Columns that a table may take. A narrower terminal wraps its lines, but no number is cut short.
WIDTH = 400

#: Headings of the table. They and a common run fit 80 columns.
HEADINGS = ("stage", "until\nepoch", "samples", "steps", "batch", "world ×\nmicro × accum", "lr", "SFO\nafter")

RESET = "the optimizer's first moments begin anew wherever the batch changes"

NOT_SGD = "theory: its bound is one of SGD without momentum; nothing is predicted for this optimizer"

SHIFTED = "theory: its bound is one of gradients at the parameters; nothing is predicted with extrapolate"

DRAWN = "rows are drawn by coins: batches are means, and the first update that reaches the budget is the last"

TWICE = "extrapolate.kind=fresh evaluates each sample twice: twice the gradient evaluations that are shown"

NOT_DELAYED = "theory: its bound is one without engine.delay; nothing is predicted"

PROBED = "run.probe's evaluations are charged to budget.sfo: there will be fewer updates than are shown"

AUTO = "engine.max_micro=auto: shown as if memory held every share; it is measured when the run begins"


def show(run: Run, world: int | None, rows: int, pace: Pace | None = None, scale: float | None = None) -> bool:
    """Print the plan to standard output, and its problems to standard error.

    Of adaptive growth there are two tables, the bounds of what the run may do.

    Args:
        run: The run.
        world: Number of ranks. If None, each stage has the number that it wants.
        rows: Most rows of a table: the first and the last stages. All stages are computed and checked.
        pace: Speed of a worker. If given, seconds and worker-seconds are printed too.
        scale: Noise scale of the gradient. If given too, so is the fastest batch.

    Returns:
        Whether the run can be carried out.
    """
    controller = run.controller(world)
    violated = problems(run, controller)
    tables, text = Console(width=WIDTH, highlight=False), Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    for title, soonest in BOUNDS if controller.growth.adaptive else (("", False),):
        if title:
            text.print(f"{controller.growth.name} growth {title}")
        table, sums = _bound(controller, run.optimizer, soonest, rows)
        tables.print(table)
        reductions = [] if violated else communication(run.engine, controller, soonest=soonest)
        late = run.engine.delay > 0 or isinstance(run.engine, Async)
        theory = None if late else run.applicable_theory()
        predicted = predictions(theory, controller, soonest=soonest)
        costs = _costs(controller, pace, scale, soonest)
        _print(text, [*sums, *reductions, *predicted, *costs])
    _print(text, _remarks(run, controller))
    _print(Console(stderr=True, highlight=False, soft_wrap=True), [f"distgrow: {problem}" for problem in violated])
    return not violated


def _costs(controller: Controller, pace: Pace | None, scale: float | None, soonest: bool) -> list[str]:
    """Return the seconds of the plan and the fastest batch, if the pace is known."""
    if pace is None:
        return []
    return [*fastest(controller, pace, scale, soonest=soonest), *savings(controller, pace, soonest=soonest)]


def _print(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, markup=False)


def _remarks(run: Run, controller: Controller) -> list[str]:
    """Return what a reader of the plan must know beside its numbers."""
    return [
        *([word] if (word := no_growth(controller)) is not None else []),
        *controller.growth.remarks(),
        *([RESET] if controller.at_growth.moments == "reset" else []),
        *([DRAWN] if draws_size(controller.sampling) else []),
        *([AUTO] if run.engine.max_micro == "auto" else []),
        *([NOT_SGD] if run.theory is not None and not run.optimizer.plain_sgd else []),
        *([SHIFTED] if run.theory is not None and run.extrapolate is not None else []),
        *([TWICE] if run.extrapolate is not None and run.extrapolate.evaluations > 1 else []),
        *(_delayed(run, controller) if run.engine.delay else []),
        *(_asynchronous(run.engine, controller) if isinstance(run.engine, Async) else []),
        *_pruning(controller),
        *_experts(controller),
        *([PROBED] if run.run.probe.every_epochs is not None and run.budget.sfo is not None else []),
    ]


def _delayed(run: Run, controller: Controller) -> list[str]:
    """Return what the delay of gradients makes of the batches, beside the critical delay if it is known."""
    delay, theory = run.engine.delay, run.applicable_theory()
    batch = max(batch for _, batch in controller.reach())
    lines = [
        f"engine.delay={delay}: a batch b counts as (τ + 1)·b against the critical batch, up to {(delay + 1) * batch:,}"
    ]
    if theory is not None:
        lines.append(NOT_DELAYED)
        critical = staleness.critical_delay(0.0, theory.variance, theory.epsilon**2, batch)
        lines.append(f"delays well below (σ²/ε²)/b = {critical:,.1f} updates cost next to nothing at batch {batch:,}")
    return lines


def _asynchronous(engine: Async, controller: Controller) -> list[str]:
    """Return what asynchronous workers make of the batches."""
    late, batch = engine.workers - 1, max(batch for _, batch in controller.reach())
    return [
        f"engine.workers={engine.workers}: gradients are {late} updates late on average, so a batch b counts as "
        f"{engine.workers}·b against the critical batch, up to {engine.workers * batch:,}; no two runs are equal"
    ]


def _bound(controller: Controller, optimizer: OptimizerSpec, soonest: bool, rows: int) -> tuple[Table, list[str]]:
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
    return _table(controller, optimizer, head, list(tail), count), sums


def _table(controller: Controller, optimizer: OptimizerSpec, head: list[Stage], tail: list[Stage], count: int) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in (*HEADINGS, *_settings(controller, optimizer, head[0])):
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


def _experts(controller: Controller) -> list[str]:
    """Return what active experts make of the run's compute; nothing if there are none, or the model is pruned, too."""
    weights, sparsity, total = controller.weights, controller.sparsity, controller.whole_axis.samples
    if weights is None or (sparsity is not None and sparsity.target):
        return []
    mean = weights.average
    return [
        f"a token uses {mean:.4g} of the blocks' weights on average: a compute of {mean * total:,.0f} evaluations with "
        f"all {weights.experts} experts"
    ]


def _pruning(controller: Controller) -> list[str]:
    """Return when the model is pruned, and what the run costs; nothing if it stays dense."""
    sparsity, total = controller.sparsity, controller.whole_axis.samples
    if sparsity is None or not sparsity.target:
        return []
    first, last = pruned_samples(sparsity.target, sparsity.start, sparsity.end)
    mean = sparsity.average_density
    return [
        f"pruned to a density of {1 - sparsity.target:.4g} from sample {first * total:,.0f} to {last * total:,.0f}, in "
        f"{sparsity.prunings:,} steps at most; {mean:.4g} on average: a compute of {mean * total:,.0f} evaluations of "
        "the dense model"
    ]


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
        f"{count:,} stages, {steps:,} updates, {sfo:,} gradient evaluations; "
        f"at constant batch {controller.growth.start:,}: {constant:,} updates ({constant / steps:.1f} ×)"
    )


def _probes(controller: Controller, last: Stage) -> list[str]:
    """Return the cost of the exact measurements of ‖∇f‖, or of the branches, that growth needs, if it needs any."""
    if (bound := branches_bound(controller, last.first_sample + last.samples)) is not None:
        return [f"and branches that do not go on: at most {bound:,} gradient evaluations more"]
    count = controller.probe_count(last.first_step + last.steps, last.stage)
    if count == 0:
        return []
    evaluations = f"and {count:,} probes of ‖∇f‖: {count * controller.epoch:,} gradient evaluations more"
    fewer = ", which budget.sfo leaves for fewer updates than are shown" if controller.budget.sfo else ""
    return [evaluations + fewer]


def communication(engine: EngineSpec, controller: Controller, *, soonest: bool) -> list[str]:
    """Return the number of reductions of an update if each micro-batch is reduced, and what units compile anew for."""
    shares = {(batch, controller.ranks(stage)) for stage, batch, _ in controller.outline(Progress(), soonest=soonest)}
    sizes = [split(batch, ranks, controller.max_micro) for batch, ranks in shares]
    micros, most = sorted({micro for micro, _ in sizes}), max(accum for _, accum in sizes)
    found: list[str] = []
    if isinstance(engine, DeepSpeed) and engine.zero > 1 and most > 1:
        found = [f"ZeRO {engine.zero} reduces every micro-batch: up to {most} reductions an update; zero=1 needs one"]
    if isinstance(engine, FSDP) and engine.reduce == "every" and most > 1:
        found = [f"reduce=every reduces each micro-batch: up to {most} reductions an update; reduce=last needs one"]
    if isinstance(engine, FSDP) and engine.compile and len(micros) > 1:
        found.append(
            f"engine.compile compiles for {len(micros)} sizes of micro-batches, {micros[0]} to {micros[-1]} rows; "
            f"engine.max_micro={micros[0]} holds the first"
        )
    return found


def predictions(theory: Theory | None, controller: Controller, *, soonest: bool) -> list[str]:
    """Return the predicted SFO to ‖∇f‖ ≤ ε, and that of the best constant batch at the base learning rate (sgd.py)."""
    if theory is None:
        return []
    constants, lr, epsilon = theory.constants(), controller.lr.base, theory.epsilon
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
