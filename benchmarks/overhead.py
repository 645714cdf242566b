"""What distgrow's loop costs per update, against a hand-written loop on the same model, data and split.

`python benchmarks/overhead.py` measures one process here and two under torchrun. Every rank uses one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from paired import Block, Report, Spread, interleave, keep, ratio, show, spread
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distgrow import datasets, models
from distgrow.controller import Controller
from distgrow.engine import Torch
from distgrow.engine.torch import TorchEngine
from distgrow.lr import LR
from distgrow.progress import Progress
from distgrow.run import Checkpointing, RunFolder, RunSpec
from distgrow.schedule import Constant, Exponential, Growth
from distgrow.stages import Budget, Every, Stages
from distgrow.tasks import Task
from distgrow.track import JSONL, Event, NullTracker, Tracker
from distgrow.train import Job, Result
from distgrow.world import World, joined, launched

LR_BASE = 0.02
Model = Literal["cnn", "mlp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the overhead table before it is measured."""

    model: Model
    micro: int
    accum: int
    updates: int  #: of a block
    limit: float  #: largest ratio to the bare loop that is good enough


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Seconds per update of distgrow over those of the bare loops."""

    model: Model
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


CASES = [
    Case(model="cnn", micro=16, accum=1, updates=8, limit=1.02),
    Case(model="cnn", micro=16, accum=4, updates=2, limit=1.02),
    Case(model="mlp", micro=4, accum=1, updates=100, limit=1.10),
    Case(model="mlp", micro=4, accum=4, updates=40, limit=1.10),
]


# ── what is trained ─────────────────────────────────────────────────────────────────────────────────────────────


def cnn() -> nn.Module:
    """Three convolutions on (3, 32, 32)."""
    layers: list[nn.Module] = []
    for width_in, width in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.GroupNorm(width // 8, width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


def build(model: Model) -> Task:
    """The digits in memory, for the CNN enlarged to (3, 32, 32)."""
    torch.manual_seed(0)
    train, _ = datasets.digits()
    if model == "mlp":
        return Task(model=models.mlp(64, [128, 64], 10), loss=cross_entropy, train=train)
    images = F.interpolate(train.inputs, scale_factor=4).expand(-1, 3, -1, -1).contiguous()
    return Task(model=cnn(), loss=cross_entropy, train=datasets.Arrays(images, train.labels))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over the rows."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


# ── the contestants ─────────────────────────────────────────────────────────────────────────────────────────────


class Bare:
    """The loop that one writes by hand: DDP, no_sync, batches indexed out of a shuffled tensor."""

    def __init__(self, task: Task, world: World, *, logging: bool = False) -> None:
        self.world, self.logging = world, logging
        self.inputs, self.labels = task.train.inputs, task.train.labels
        self.model = task.model
        self.ddp = DistributedDataParallel(task.model, gradient_as_bucket_view=True) if world.size > 1 else None
        self.optimizer = torch.optim.SGD(task.model.parameters(), lr=LR_BASE)
        self.shuffled, self.cursor = torch.randperm(len(self.inputs)), 0
        self.losses: list[float] = []
        self.norms: list[float] = []

    def updates(self, count: int, micro: int, accum: int) -> None:
        """`count` updates of accum micro-batches of `micro` rows on each rank."""
        model = self.model if self.ddp is None else self.ddp
        for _ in range(count):
            rows = self._rows(micro * accum)
            losses: list[Tensor] = []
            for k in range(accum):
                batch = rows[k * micro : (k + 1) * micro]
                quiet = self.ddp.no_sync() if self.ddp is not None and k < accum - 1 else nullcontext()
                with quiet:
                    loss = F.cross_entropy(model(self.inputs[batch]), self.labels[batch])
                    (loss / accum if accum > 1 else loss).backward()
                losses.append(loss.detach())
            if self.logging:
                self._log(losses)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _log(self, losses: list[Tensor]) -> None:
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.norms.append(norm.item())
        self.losses.append(torch.stack(losses).mean().item())

    def _rows(self, share: int) -> Tensor:
        batch = share * self.world.size
        if self.cursor + batch > len(self.shuffled):
            self.shuffled, self.cursor = torch.randperm(len(self.inputs)), 0
        first = self.cursor + share * self.world.rank
        self.cursor += batch
        return self.shuffled[first : first + share]


class Stamps:
    """A tracker that also keeps the moment at which each step line has been written."""

    def __init__(self, inner: Tracker) -> None:
        self.inner = inner
        self.moments: list[float] = []

    def log(self, event: Event) -> None:
        """Log, then look at the clock."""
        self.inner.log(event)
        if event["event"] == "step":
            self.moments.append(time.perf_counter())

    def close(self) -> None:
        """Close the inner tracker."""
        self.inner.close()


class Endless(Job):
    """The loop of a real run, which here ends without a checkpoint."""

    def finish(self, progress: Progress) -> Result:
        """Nothing is written."""
        return Result(progress=progress, metrics={}, finished=True)


def build_job(
    task: Task, world: World, growth: Growth, *, micro: int, folder: Path, stages: Stages | None = None
) -> Endless:
    """All that fit() puts together, with metrics.jsonl in `folder` as the only tracker."""
    run = RunSpec(dir=str(folder), checkpoint=Checkpointing(every_s=1e9))
    controller = Controller(
        growth=growth,
        stages=stages or Stages(),
        lr=LR(base=LR_BASE),
        budget=Budget(steps=1),
        epoch=len(task.train),
        world=world.size,
        max_micro=micro,
    )
    engine = TorchEngine(task.model, task.loss, spec=Torch(device="cpu", max_micro=micro), world=world)
    tracker = JSONL(folder / "metrics.jsonl") if world.rank == 0 else NullTracker()
    return Endless(task, controller, engine, tracker, RunFolder(folder), run, world)


# ── the questions ───────────────────────────────────────────────────────────────────────────────────────────────


def block(work: Callable[[], object], world: World) -> Block:
    """A block that begins on all ranks at once."""

    def run() -> float:
        world.sum([0.0])
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return run


def distgrow_block(job: Job, updates: int, world: World) -> Block:
    """A block of updates of a real run, going on where the one before it ended."""
    progress = Progress()

    def go_on() -> None:
        nonlocal progress
        progress = job.train(progress).progress

    inner = block(go_on, world)

    def run() -> float:
        job.controller = replace(job.controller, budget=Budget(steps=progress.step + updates))
        return inner()

    return run


def measure_overhead(case: Case, world: World, rounds: int, folder: Path) -> Overhead:
    """Blocks of distgrow, the bare loop and the bare loop with logging, taking turns."""
    batch = case.micro * case.accum * world.size
    job = build_job(build(case.model), world, Constant(start=batch), micro=case.micro, folder=folder)
    bare, logging = Bare(build(case.model), world), Bare(build(case.model), world, logging=True)
    blocks = {
        "distgrow": distgrow_block(job, case.updates, world),
        "bare": block(lambda: bare.updates(case.updates, case.micro, case.accum), world),
        "logging": block(lambda: logging.updates(case.updates, case.micro, case.accum), world),
    }
    seconds = interleave(blocks, rounds)
    job.track.close()
    return Overhead(
        model=case.model,
        world=world.size,
        micro=case.micro,
        accum=case.accum,
        bare_us=statistics.median(seconds["bare"]) / case.updates * 1e6,
        distgrow_us=statistics.median(seconds["distgrow"]) / case.updates * 1e6,
        over_bare=ratio(seconds["distgrow"], seconds["bare"]),
        over_logging=ratio(seconds["distgrow"], seconds["logging"]),
        limit=case.limit,
    )


def measure_transition(model: Model, world: World, ladders: int, folder: Path) -> Transition:
    """Whole ladders of a growing run and of a bare loop whose batch changes at the same updates, taking turns."""
    start, rungs, updates = 16 * world.size, 4, 24
    growth = Exponential(start=start, factor=2, cap=start * 2 ** (rungs - 1))
    stages = Stages(every=Every(steps=updates))
    job = build_job(build(model), world, growth, micro=64, folder=folder, stages=stages)
    job.track = stamps = Stamps(job.track)
    job.controller = replace(job.controller, budget=Budget(steps=rungs * updates))
    bare = Bare(build(model), world)
    extra: dict[str, list[float]] = {"distgrow": [], "bare": []}
    for _ in range(ladders):
        stamps.moments.clear()
        job.train(Progress())
        extra["distgrow"] += extra_of_first(stamps.moments, updates)
        moments: list[float] = []
        for stage in range(rungs):
            share = 16 * 2**stage
            for _ in range(updates):
                bare.updates(1, min(64, share), max(1, share // 64))
                moments.append(time.perf_counter())
        extra["bare"] += extra_of_first(moments, updates)
    job.track.close()
    return Transition(
        model=model,
        world=world.size,
        batches=[growth(stage) for stage in range(rungs)],
        distgrow=spread(extra["distgrow"]),
        bare=spread(extra["bare"]),
    )


def extra_of_first(moments: list[float], updates: int) -> list[float]:
    """For every stage but the first: (first update − median update) / median update; stages of `updates` updates."""
    seconds = [after - before for before, after in zip(moments, moments[1:], strict=False)]
    firsts = range(updates - 1, len(seconds), updates)
    return [seconds[i] / statistics.median(seconds[i + 1 : i + updates]) - 1 for i in firsts]


# ── running and showing ─────────────────────────────────────────────────────────────────────────────────────────


def measure(*, quick: bool) -> Iterator[Overhead | Transition]:
    """Every row, in the world that the environment describes. Collective: every rank must call."""
    torch.set_num_threads(1)
    rounds, ladders = (4, 2) if quick else (100, 20)
    with joined("cpu") as world, tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            yield measure_overhead(case, world, rounds, Path(folder))
        for model in ("cnn", "mlp"):
            yield measure_transition(model, world, ladders, Path(folder))


def measure_two(*, quick: bool) -> list[Overhead | Transition]:
    """The same in two processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, __file__, "--jsonl", str(path), *(["--quick"] if quick else [])]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return [read_row(json.loads(line)) for line in path.read_text().splitlines()]


def read_row(values: dict[str, Any]) -> Overhead | Transition:
    """The inverse of `keep`."""
    kind = {"Overhead": Overhead, "Transition": Transition}[values.pop("benchmark")]
    values.pop("hardware")
    return kind(**{key: Spread(**value) if isinstance(value, dict) else value for key, value in values.items()})


def reports(rows: list[Overhead | Transition]) -> list[Report]:
    """The two tables."""
    overheads = [row for row in rows if isinstance(row, Overhead)]
    transitions = [row for row in rows if isinstance(row, Transition)]
    return [
        Report(
            title="Time per update, distgrow over a hand-written loop: median of paired ratios (quartiles)",
            columns=["model", "world × micro × accum", "bare µs", "distgrow µs", "÷ bare", "target", "÷ logging"],
            rows=[
                [
                    row.model.upper(),
                    f"{row.world} × {row.micro} × {row.accum}",
                    f"{row.bare_us:,.0f}",
                    f"{row.distgrow_us:,.0f}",
                    str(row.over_bare),
                    f"≤ {row.limit:.2f} {'met' if row.over_bare.median <= row.limit else 'missed'}",
                    str(row.over_logging),
                ]
                for row in overheads
            ],
        ),
        Report(
            title="First update of a new stage beyond the stage's median update, in updates: median (quartiles)",
            columns=["model", "processes", "batches", "distgrow", "bare loop, same batches", "target"],
            rows=[
                [
                    row.model.upper(),
                    str(row.world),
                    " → ".join(map(str, row.batches)),
                    str(row.distgrow),
                    str(row.bare),
                    f"< 1 {'met' if row.distgrow.median < 1 else 'missed'}",
                ]
                for row in transitions
            ],
        ),
    ]


def main() -> None:
    """Measure, keep, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: seconds, with numbers that mean nothing")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args()
    rows = list(measure(quick=options.quick))
    if launched():
        if os.environ["RANK"] == "0":
            keep(options.jsonl, rows)
        return
    rows += measure_two(quick=options.quick)
    if options.jsonl:
        keep(options.jsonl, rows)
    show(reports(rows), markdown=options.markdown)


if __name__ == "__main__":
    main()
