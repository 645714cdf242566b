"""Whether gradients at shifted points help a large constant batch, and what a past shift costs in time.

Each kind of shift is tried at three learning rates and two or three γ̂ with one seed. The cell with the lowest test
loss is then trained with three other seeds, beside the plain large batch, the plain small one, and a batch that grows
from one to the other, each at its own best learning rate. All take the same samples. Fresh shifts evaluate each sample
twice, so at equal evaluations they have made half the updates.
"""

import contextlib
import io
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from loops import build, build_job
from overhead import distgrow_block
from paired import Report, Spread, arguments, interleave, keep, ratio, show

from distgrow import (
    SGD,
    AdamW,
    Extrapolate,
    RunSpec,
    Torch,
    budget,
    constant,
    constant_lr,
    every,
    exponential,
    fit,
    sqrt_lr,
)
from distgrow.data import datasets
from distgrow.distributed.world import joined
from distgrow.growth.constant import Constant
from distgrow.optim import OptimizerSpec
from distgrow.tasks import models
from distgrow.tasks.architectures import GPT
from distgrow.tasks.builtin import Digits, Text
from distgrow.tasks.task import Task
from distgrow.tracking.read import read_events
from distgrow.training.spec import Evaluation

SMALL, GROUP, LIMIT = 32, 32, 1.05
#: Shares of η (fresh, past), or of each filter's norm (noise).
RATES = {"past": (0.03, 0.125, 0.5), "fresh": (0.03, 0.125, 0.5), "noise": (0.02, 0.1)}
SHIFTS: Mapping[str, dict[str, Any]] = {
    "past": {"kind": "past"},
    "fresh": {"kind": "fresh"},
    "noise": {"kind": "noise"},
    "fresh, groups": {"kind": "fresh", "local": True, "group": GROUP},
    "noise, groups": {"kind": "noise", "local": True, "group": GROUP},
}


def pictures() -> Task:
    """Return the digits as pictures of one channel, for a ResNet-8 with group norm."""
    task = Digits().build(None)
    train, test = (datasets.Arrays(part.inputs.reshape(-1, 1, 8, 8), part.labels) for part in datasets.digits())
    torch.manual_seed(0)
    model = models.resnet(1, 10, widths=[16, 32, 64], blocks=1, norm=models.group_norm)
    return Task(model=model, loss=task.loss, metrics=task.metrics, train=train, test=test)


def text() -> Task:
    """Return next bytes of Python's standard library, for a small GPT; 256 windows are the test set."""
    torch.manual_seed(0)
    task = Text(length=32).build(GPT(layers=2, width=64, heads=2))
    return replace(task, test=torch.utils.data.Subset(task.test, range(256)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Hold a task, its large batch, its optimizer and the learning rates that are tried at that batch."""

    task: Callable[[], Task]
    batch: int
    optimizer: OptimizerSpec
    lrs: tuple[float, ...]
    updates: int = 40


PROBLEMS = {
    "digits, ResNet-8": Problem(task=pictures, batch=256, optimizer=SGD(momentum=0.9), lrs=(0.1, 0.3, 0.9)),
    "text, small GPT": Problem(task=text, batch=128, optimizer=AdamW(weight_decay=0.1), lrs=(0.003, 0.01, 0.03)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Hold a setting: a learning rate at the large batch, and a shift, or a plain batch that is called by a name."""

    problem: str
    method: str  #: of SHIFTS; "large", "small" or "grown" without a shift
    lr: float
    rate: float = 0.0  #: γ̂


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Hold a run's test losses after a quarter, a half and all of its samples; inf if it diverged."""

    cell: Cell
    seed: int
    quarter: float
    half: float
    whole: float
    evaluations: int


def train(cell: Cell, seed: int, updates: int) -> Trained:
    """Train a cell on as many samples as `updates` large batches."""
    torch.set_num_threads(1)
    problem = PROBLEMS[cell.problem]
    task, samples = problem.task(), problem.batch * updates
    growth: dict[str, Any] = {"growth": constant(problem.batch), "lr": constant_lr(cell.lr)}
    ratio_of = problem.batch / SMALL
    if cell.method == "small":
        growth = {"growth": constant(SMALL), "lr": constant_lr(cell.lr / ratio_of**0.5)}
    elif cell.method == "grown":
        steps = math.log2(ratio_of) + 1
        stages = every(samples=int(samples / steps))
        growth = {
            "growth": exponential(SMALL, 2, problem.batch),
            "stages": stages,
            "lr": sqrt_lr(cell.lr / ratio_of**0.5),
        }
    shift = Extrapolate(rate=cell.rate, **SHIFTS[cell.method]) if cell.method in SHIFTS else None
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        run = RunSpec(dir=f"{folder}/run", seed=seed, eval=Evaluation(every_samples=samples // 4))
        parts: dict[str, Any] = {"test": task.test, "metrics": task.metrics, "optimizer": problem.optimizer}
        result = fit(
            task.model, task.loss, task.train, **growth, **parts, budget=budget(samples=samples), extrapolate=shift,
            engine=Torch(device="cpu", max_micro=problem.batch), run=run,
        )  # fmt: skip
        lines = [event.to_json() for event in read_events(Path(folder) / "run/metrics.jsonl")]
    losses = [line["loss"] for line in lines if line["event"] == "eval" and line["samples"]]
    quarter, half, whole = (_finite(losses[k]) for k in (0, 1, 3))
    evaluations = result.progress.ledger.total
    return Trained(cell=cell, seed=seed, quarter=quarter, half=half, whole=whole, evaluations=evaluations)


def _finite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def cells(*, quick: bool) -> Iterator[Cell]:
    """Yield all that is tried with the first seed; `quick`: one learning rate and one γ̂ alone."""
    most = 1 if quick else None
    for name, problem in PROBLEMS.items():
        for lr in problem.lrs[:most]:
            yield from (Cell(problem=name, method=method, lr=lr) for method in ("small", "grown", "large"))
            for method, shift in SHIFTS.items():
                for rate in RATES[shift["kind"]][:most]:
                    share = rate if shift["kind"] == "noise" else rate * lr
                    yield Cell(problem=name, method=method, lr=lr, rate=share)


def tried(pool: ProcessPoolExecutor, *, quick: bool) -> tuple[list[Trained], list[Trained]]:
    """Return the runs of the first seed, and those of other seeds of each method's best cell."""
    updates = 4 if quick else 40
    first = list(pool.map(train, *zip(*((cell, 0, updates) for cell in cells(quick=quick)), strict=True)))
    best = dict[tuple[str, str], Trained]()
    for run in first:
        key = (run.cell.problem, run.cell.method)
        if key not in best or run.whole < best[key].whole:
            best[key] = run
    again = [(run.cell, seed, updates) for run in best.values() for seed in range(1, 2 if quick else 4)]
    return first, list(pool.map(train, *zip(*again, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time of an update with a past shift over that of one without."""

    micro: int
    accum: int
    over_plain: Spread


def costs(folder: Path, *, rounds: int) -> Iterator[Cost]:
    """Blocks of the CNN's updates with a past shift and without, taking turns."""
    with joined("cpu", alone=True) as world:
        for micro, accum, updates in ((16, 1, 8), (64, 1, 3), (64, 4, 1)):
            jobs = {
                name: build_job(
                    build("cnn"), world, Constant(start=micro * accum), engine=Torch(device="cpu", max_micro=micro),
                    folder=folder / f"{name}-{micro}-{accum}", extrapolate=shift,
                )
                for name, shift in (("plain", None), ("past", Extrapolate(kind="past", rate=0.01)))
            }  # fmt: skip
            seconds = interleave({name: distgrow_block(job, updates, world) for name, job in jobs.items()}, rounds)
            for job in jobs.values():
                job.events.tracker.close()
            yield Cost(micro=micro, accum=accum, over_plain=ratio(seconds["past"], seconds["plain"]))


def reports(first: list[Trained], again: list[Trained], rows: list[Cost]) -> list[Report]:
    """Return the losses, what the first seed showed by learning rate, and the cost."""
    return [*(by_method(name, again) for name in PROBLEMS), *(by_lr(name, first) for name in PROBLEMS), cost_of(rows)]


def by_method(problem: str, runs: list[Trained]) -> Report:
    """Return the test losses of each method's best cell, mean (spread) of the seeds that did not choose it."""
    rows = list[list[str]]()
    for method in ("small", "grown", "large", *SHIFTS):
        own = [run for run in runs if (run.cell.problem, run.cell.method) == (problem, method)]
        cell, twice = own[0].cell, method.startswith("fresh")
        equal = [run.half if twice else run.whole for run in own]
        columns = ([run.quarter for run in own], [run.whole for run in own], equal)
        rate = f"{cell.rate:g}" if method in SHIFTS else "–"
        rows.append([method, f"{cell.lr:g}", rate, *map(_spread, columns), f"{own[0].evaluations:,}"])
    batch = PROBLEMS[problem].batch
    return Report(
        title=f"{problem}, b = {batch}: test loss, mean (least … most) of three seeds",
        columns=["gradients", "η", "γ̂", "¼ of the updates", "equal updates", "equal evaluations", "evaluations of all"],
        rows=rows,
    )


def _spread(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.3f} ({min(losses):.3f} … {max(losses):.3f})"


def by_lr(problem: str, runs: list[Trained]) -> Report:
    """Return the lowest test loss of all γ̂ at each learning rate, with the seed that chose."""
    rows, lrs = list[list[str]](), sorted({run.cell.lr for run in runs if run.cell.problem == problem})
    for method in ("small", "grown", "large", *SHIFTS):
        own = [run for run in runs if (run.cell.problem, run.cell.method) == (problem, method)]
        losses = (min(run.whole for run in own if run.cell.lr == lr) for lr in lrs)
        rows.append([method, *(f"{loss:.3f}" for loss in losses)])
    title = f"{problem}: test loss at equal updates by η, of one seed, at the best γ̂"
    return Report(title=title, columns=["gradients", *(f"η = {lr:g}" for lr in lrs)], rows=rows)


def cost_of(rows: list[Cost]) -> Report:
    """Return the cost of a past shift."""
    return Report(
        title="Time of an update of the CNN with a past shift over one without: median of paired ratios (quartiles)",
        columns=["micro × accum", "÷ without", "target"],
        rows=[
            [
                f"{row.micro} × {row.accum}", str(row.over_plain),
                f"≤ {LIMIT} {'met' if row.over_plain.median <= LIMIT else 'missed'}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def main() -> None:
    """Measure, keep, show."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(costs(Path(folder), rounds=4 if options.quick else 60))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        first, again = tried(pool, quick=options.quick)
    if options.jsonl:
        keep(options.jsonl, [*first, *again, *rows])
    show(reports(first, again, rows), markdown=options.markdown)


if __name__ == "__main__":
    main()
