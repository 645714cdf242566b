"""`distgrow range-test`: the largest learning rate that is stable at b₀, by short runs from the first weights."""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter
from rich.console import Console
from rich.table import Table

from distgrow.config.run import Run
from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.lr import constant_lr
from distgrow.core.progress import finite
from distgrow.core.stages import Stages
from distgrow.critical_batch.figure import last_loss
from distgrow.critical_batch.probe import trained
from distgrow.data.dataset import size_of
from distgrow.data.seeding import seed_generators
from distgrow.distributed.world import World, joined
from distgrow.engine.asynchronous.spec import Async
from distgrow.growth.constant import Constant
from distgrow.report.plots import COLOURS
from distgrow.run.folder import RunFolder, storing
from distgrow.tasks.task import Task

#: Updates of each run by default, and the fewest.
UPDATES, LEAST = 200, 20
#: Powers of 2 that are tried above and below lr.base, at most.
MOST = 10
#: Samples whose mean loss is that of the first weights.
FIRST = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RateResult:
    """Hold one short run."""

    power: int  #: its learning rate is lr.base · 2^power
    lr: float
    first: float  #: mean training loss of its first FIRST samples
    loss: float  #: mean training loss over the last quarter of its samples; inf if it diverged
    evaluations: int
    seconds: float


def start_loss(results: Sequence[RateResult]) -> float:
    """Return the loss of the first weights: the least of all runs, as those that diverge have moved by then."""
    return min((result.first for result in results if math.isfinite(result.first)), default=math.inf)


def stable(result: RateResult, start: float) -> bool:
    """Return whether a run has not diverged: its last loss is finite and below that of the first weights."""
    return math.isfinite(result.loss) and result.loss < start


def next_power(tried: Mapping[int, bool]) -> int | None:
    """Return the power to try next, given which are stable; None: the edge, or an end of the range, is found.

    From 0 it goes up as long as runs are stable; if the first is not, down to the first that is.
    """
    if not tried:
        return 0
    if tried[0]:
        return max(tried) + 1 if tried[max(tried)] and max(tried) < MOST else None
    return min(tried) - 1 if not tried[min(tried)] and min(tried) > -MOST else None


def range_test(run: Run, updates: int = UPDATES, out: str | None = None) -> None:
    """Try learning rates; print a table and a proposal, write JSON and a figure. Collective: every rank must call.

    Args:
        run: The config. Of its growth only b₀ is used, of its learning rate only lr.base.
        updates: Updates of each run, at constant b₀ and η.
        out: Folder for the results. None: the one in which run.dir lies.

    Raises:
        ConfigError: Such runs cannot be made.
    """
    if isinstance(run.engine, Async):
        raise ConfigError("range-test: with engine.kind=async delays differ from run to run; give engine.kind=torch")
    if updates < LEAST:
        raise ConfigError(f"--updates={updates}: too few to tell whether a run diverges; give at least {LEAST}")
    folder = Path(out) if out is not None else Path(run.run.dir).absolute().parent
    with joined(run.engine.device, run.launch.timeout_s, alone=run.engine.needs_group) as world:
        console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, quiet=world.rank > 0)
        seed_generators(run.run.seed)
        task = world.on_all_ranks(lambda: run.task.build(run.model))
        results: list[RateResult] = []
        with _scratch(folder, world) as place:
            while (power := next_power(_stable(results))) is not None:
                results.append(_try(run, power, updates, task, place, world))
                console.print(_line(results[-1]))
        if world.rank == 0:
            _report(sorted(results, key=lambda result: result.power), run, updates, folder)


def _stable(results: Sequence[RateResult]) -> dict[int, bool]:
    start = start_loss(results)
    return {result.power: stable(result, start) for result in results}


@contextmanager
def _scratch(folder: Path, world: World) -> Iterator[RunFolder]:
    """Make a run's folder that is gone afterwards."""

    def make() -> str:
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.mkdtemp(prefix=".range-test-", dir=folder)

    place = RunFolder(world.on_rank0(make))
    try:
        yield place
    finally:
        if world.rank == 0:
            shutil.rmtree(place.path, ignore_errors=True)


def _try(run: Run, power: int, updates: int, task: Task, folder: RunFolder, world: World) -> RateResult:
    """Make one short run from the task's own weights. Only rank 0 has its losses."""
    lr, began, start = run.lr.base * 2.0**power, time.monotonic(), run.growth.start
    controller = replace(
        run.controller(world.size),
        epoch=size_of(task.train),
        growth=Constant(start=start),
        lr=constant_lr(lr),
        stages=Stages(),
        budget=Budget(samples=updates * start),
        average=None,
        active=None,
        sparsity=None,
        weights=None,
    )
    controller.check()
    recorder, _ = trained(run.model_copy(update={"sparsity": None}), controller, task, folder, world, begin=True)
    curve = [(e["samples"], math.inf if e["loss"] is None else e["loss"]) for e in recorder.updates]
    first = [loss for samples, loss in curve if samples <= max(FIRST, start)]
    loss = last_loss(curve) if len(curve) == updates else math.inf
    losses = world.on_rank0(lambda: (sum(first) / len(first) if first else math.inf, loss))
    evaluations = recorder.last.get("sfo", 0)
    seconds = time.monotonic() - began
    return RateResult(power=power, lr=lr, first=losses[0], loss=losses[1], evaluations=evaluations, seconds=seconds)


def _line(result: RateResult) -> str:
    loss = f"training loss {result.loss:.4f}" if math.isfinite(result.loss) else "diverged"
    return f"lr {result.lr:.4g}: {loss}, {result.seconds:.1f} s"


def answers(results: Sequence[RateResult]) -> tuple[float | None, float | None]:
    """Return the largest stable learning rate, and that of the least loss among stable ones; None if none is."""
    start = start_loss(results)
    kept = [result for result in results if stable(result, start)]
    if not kept:
        return None, None
    return max(result.lr for result in kept), min(kept, key=lambda result: result.loss).lr


def _report(results: Sequence[RateResult], run: Run, updates: int, folder: Path) -> None:
    """Print the table and what follows from it; write JSON and the figure."""
    start, (largest, best) = start_loss(results), answers(results)
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("lr", "training loss", ""):
        table.add_column(name, justify="right")
    for result in results:
        told = f"{result.loss:.4f}" if math.isfinite(result.loss) else "diverged"
        table.add_row(f"{result.lr:.4g}", told, "" if stable(result, start) else "unstable")
    console.print(table, soft_wrap=False)
    for line in sentences(results, run.growth.start):
        console.print(line)
    name = f"range-test-{Path(run.run.dir).name}"
    values: dict[str, Any] = {
        "start": run.growth.start,
        "updates": updates,
        "first_loss": finite(start),
        "largest_stable_lr": largest,
        "proposed_lr": best,
        "evaluations": sum(result.evaluations for result in results),
        "runs": [{key: finite(value) for key, value in asdict(result).items()} for result in results],
    }
    with storing(folder):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        figure(results, name).savefig(folder / f"{name}.png")
    console.print(f"{values['evaluations']:,} gradient evaluations; wrote {folder / name}.json and {name}.png")


def sentences(results: Sequence[RateResult], start: int) -> list[str]:
    """Return what the runs show of the learning rate at b₀ = `start`."""
    largest, best = answers(results)
    if largest is None or best is None:
        return [f"no learning rate down to {min(result.lr for result in results):.4g} is stable: check loss and data"]
    edge = (
        "" if any(result.lr > largest for result in results) else ", the largest that was tried: the edge is above it"
    )
    lines = [f"largest stable lr at batch {start}: {largest:.4g}{edge}"]
    near = "; it is the largest stable one, so half of it is safer in a long run" if best == largest else ""
    return [*lines, f"proposed: lr.base={best:.4g}, of the least training loss{near}"]


def figure(results: Sequence[RateResult], title: str) -> Figure:
    """Draw the last loss against the learning rate; what diverged is a cross at the loss of the first weights."""
    start, (largest, _) = start_loss(results), answers(results)
    drawn = Figure(figsize=(5.0, 3.6), dpi=200, layout="constrained")
    drawn.suptitle(title, parse_math=False)
    axes = drawn.subplots()
    kept, lost = ([r for r in results if stable(r, start) is wanted] for wanted in (True, False))
    axes.plot([r.lr for r in kept], [r.loss for r in kept], marker="o", color=COLOURS[0], label="stable")
    axes.plot([r.lr for r in lost], [start] * len(lost), "x", color=COLOURS[1], label="unstable")
    axes.axhline(start, color="0.35", linestyle="--", linewidth=0.6)
    if largest is not None:
        axes.axvline(largest, color="0.35", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks([result.lr for result in results])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss at the end")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(fontsize="small", frameon=False)
    return drawn
