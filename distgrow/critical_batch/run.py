"""`distgrow probe-batch`: trains branches of a run's checkpoint with larger batches, and tells how they compare."""

import copy
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distgrow.checkpoint.spec import Checkpointing
from distgrow.checkpoint.storage import Folder
from distgrow.core.budget import Budget
from distgrow.core.errors import Diverged, TrainingFailed
from distgrow.core.probe_schedule import Probing
from distgrow.core.progress import finite
from distgrow.core.stages import Stages
from distgrow.critical_batch.branches import Branch, Question, Trunk, gain, largest, left, locate, settled
from distgrow.critical_batch.figure import Branched, figure, last_loss
from distgrow.data.seeding import seed_generators
from distgrow.distributed.world import World, joined
from distgrow.run.folder import RunFolder, storing
from distgrow.run.stop import StopRequests
from distgrow.tasks.task import Task
from distgrow.tracking.base import NullTracker
from distgrow.tracking.base_event import Line
from distgrow.training.spec import Evaluation, RunSpec
from distgrow.training.trainer import Result, Trainer


class Seed(Folder):
    """The one checkpoint that branches begin at; what they would keep is dropped."""

    def begin(self, name: str) -> str:
        """See Store."""
        return name

    def write(self, place: str, file: str, data: bytes) -> None:
        """Drop it."""

    def commit(self, place: str, name: str, manifest: bytes) -> None:
        """Drop it."""

    def delete(self, name: str) -> None:
        """There is nothing to delete."""

    def sweep(self) -> None:
        """There is nothing to delete."""


class Recorder:
    """Keeps what a branch's updates tell."""

    def __init__(self) -> None:
        self.updates: list[Line] = []
        self.last: Line = {}

    def log(self, event: Line) -> None:
        """Keep the event."""
        self.last = event
        if event["event"] in ("step", "skip"):
            self.updates.append(event)

    def close(self) -> None:
        """Do nothing."""


def probe_batch(path: str, question: Question) -> None:
    """Branch the checkpoint at `path`; print a table, write JSONL and a plot. Collective: every rank must call.

    ConfigError where that cannot be.
    """
    trunk = locate(path)
    run, out = trunk.run, Path(question.out) if question.out is not None else trunk.folder.path
    with joined(run.engine.device, run.launch.timeout_s, alone=run.engine.needs_group) as world:
        console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, quiet=world.rank > 0)
        for damage in trunk.damaged:
            console.print(f"damaged and not used: {damage}")
        seed_generators(run.run.seed)
        task = world.on_all_ranks(lambda: run.task.build(run.model))
        schedule = replace(run.controller(world.size), epoch=len(task.train))
        samples, powers = settled(question, trunk, schedule.epoch, left(trunk, schedule))
        branches: list[Branched] = []
        with seeded(trunk, out, world) as folder:
            for k in powers:
                growth = Branch(start=k * trunk.batch, trunk=schedule, gain=gain(question.rule, run.optimizer, k))
                branches.append(trained(trunk, growth, samples, task, folder, world))
                console.print(_line(branches[-1]))
        if world.rank == 0:
            _tell(branches, trunk, question, out)


@contextmanager
def seeded(trunk: Trunk, out: Path, world: World) -> Iterator[RunFolder]:
    """A folder below `out` that holds the checkpoint, as links where the file system has them; gone afterwards."""

    def made() -> str:
        with storing(out):
            out.mkdir(parents=True, exist_ok=True)
            place = tempfile.mkdtemp(prefix=".branches-", dir=out)
            target = RunFolder(place).checkpoints / trunk.checkpoint.name
            shutil.copytree(trunk.checkpoint, target, copy_function=_linked)
            return place

    folder = RunFolder(world.on_rank0(made))
    try:
        yield folder
    finally:
        if world.rank == 0:
            shutil.rmtree(folder.path, ignore_errors=True)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def trained(trunk: Trunk, growth: Branch, samples: int, task: Task, folder: RunFolder, world: World) -> Branched:
    """One branch; what its updates told is known to the first rank alone. Collective: every rank must call."""
    run, began = trunk.run, time.monotonic()
    budget = Budget(samples=trunk.progress.ledger.applied + samples)
    controller = replace(growth.trunk, growth=growth, budget=budget, stages=Stages())
    controller.check()
    seed_generators(run.run.seed)
    model, recorder = copy.deepcopy(task.model), Recorder()
    engine = run.engine.build(model, task.loss, metrics=task.metrics, optimizer=run.optimizer, world=world)
    stop, track = StopRequests(folder), recorder if world.rank == 0 else NullTracker()
    trainer = Trainer(
        task, controller, engine, track, folder, _quiet(run.run, folder), world, stop, Seed(folder.checkpoints)
    )
    with stop.watched():
        try:
            result = trainer.resume(measure=False)
        except Diverged:
            result = None
    if result is not None and not result.finished:
        raise TrainingFailed("stopped on request; nothing was written")
    return _branched(trunk, growth, recorder, result, time.monotonic() - began)


def _quiet(spec: RunSpec, folder: RunFolder) -> RunSpec:
    """A branch's habits: no checkpoints and probes, its test set evaluated at the end alone, every update told."""
    never = {"checkpoint": Checkpointing(every_s=1e9), "probe": Probing(), "log_every": 1}
    evaluation = Evaluation(every_epochs=1e9, rows=spec.eval.rows)
    return spec.model_copy(update={"dir": str(folder.path), "eval": evaluation, **never})


def _branched(trunk: Trunk, growth: Branch, recorder: Recorder, result: Result | None, seconds: float) -> Branched:
    """The record of a branch; `result` is None where it diverged."""
    start, updates = trunk.progress, recorder.updates
    curve = [(e["samples"] - start.samples, math.inf if e["loss"] is None else e["loss"]) for e in updates]
    return Branched(
        k=growth.start // trunk.batch,
        batch=growth.start,
        lr=updates[0]["lr"] if updates else math.nan,
        updates=len(curve),
        loss=last_loss(curve),
        test_loss=math.inf if result is None else result.metrics.get("loss", math.nan),
        evaluations=recorder.last.get("sfo", start.ledger.total) - start.ledger.total,
        seconds=seconds,
        curve=tuple(curve),
    )


def _line(branch: Branched) -> str:
    found = f"training loss {branch.loss:.4f}" if math.isfinite(branch.loss) else "diverged"
    return f"{branch.k} × the batch: {branch.updates} updates of {branch.batch}, {found}, {branch.seconds:.1f} s"


def _tell(branches: Sequence[Branched], trunk: Trunk, question: Question, out: Path) -> None:
    """The table and the answers on standard output; JSONL and the plot in the folder `out`."""
    losses = {"training": {b.k: b.loss for b in branches}, "test": {b.k: b.test_loss for b in branches}}
    if any(math.isnan(loss) for loss in losses["test"].values()):
        del losses["test"]
    answers = {kind: largest(found, question.tolerance) for kind, found in losses.items()}
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(branches, losses), soft_wrap=False)
    for kind, k in answers.items():
        more = "; a larger one may be too (--up-to)" if k == branches[-1].k else ""
        batch = f"{k * trunk.batch} = {k} × {trunk.batch}"
        console.print(f"largest batch no worse in {kind} loss, within {question.tolerance:g}: {batch}{more}")
    name = f"probe-batch-{trunk.checkpoint.name}"
    facts = {"checkpoint": trunk.checkpoint.name, "rule": question.rule, "tolerance": question.tolerance}
    result = {"event": "result", **facts, **{f"{kind}_batch": k * trunk.batch for kind, k in answers.items()}}
    lines = [*({"event": "branch", **_numbers(branch)} for branch in branches), result]
    with storing(out):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        title = f"{trunk.folder.path.name}, {trunk.checkpoint.name}"
        figure(branches, title, answers, question.tolerance).savefig(out / f"{name}.png")
    cost = sum(branch.evaluations for branch in branches)
    console.print(f"{cost:,} gradient evaluations; wrote {out / name}.jsonl and {name}.png", markup=False)


def _numbers(branch: Branched) -> dict[str, Any]:
    """What JSONL keeps of a branch."""
    values = asdict(branch)
    del values["curve"]
    return {key: finite(value) for key, value in values.items()}


def _table(branches: Sequence[Branched], losses: Mapping[str, Mapping[int, float]]) -> Table:
    """A row for each branch; a loss beside the best of the smaller batches'."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("k", "batch", "lr", "updates", *(f"{kind} loss" for kind in losses)):
        table.add_column(name, justify="right")
    for branch in branches:
        told = [_beside(found, branch.k) for found in losses.values()]
        table.add_row(f"{branch.k}", f"{branch.batch}", f"{branch.lr:.4g}", f"{branch.updates}", *told)
    return table


def _beside(losses: Mapping[int, float], k: int) -> str:
    smaller = [loss for other, loss in losses.items() if other < k and math.isfinite(loss)]
    if not math.isfinite(losses[k]):
        return "diverged"
    return f"{losses[k]:.4f} ({losses[k] - min(smaller):+.4f})" if smaller else f"{losses[k]:.4f}"
