"""`distgrow probe-batch`: train branches of a checkpoint with larger batches, and report how they compare."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distgrow.core.budget import Budget
from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.core.progress import finite
from distgrow.core.stages import Stages
from distgrow.critical_batch.branches import (
    Branch,
    ProbeOptions,
    Trunk,
    find_checkpoint,
    lr_factor,
    resolve,
    samples_left,
)
from distgrow.critical_batch.figure import BranchResult, figure
from distgrow.data.dataset import size_of
from distgrow.data.seeding import seed_generators
from distgrow.distributed.world import World, joined
from distgrow.engine.ability import Can
from distgrow.growth.branching import largest_no_worse
from distgrow.run.folder import RunFolder, storing
from distgrow.run.targets import check_folder, key_of
from distgrow.tasks.task import Task
from distgrow.training.result import Result
from distgrow.training.short_run import Recorder, last_loss, scratch, trained


def probe_batch(path: str, options: ProbeOptions) -> None:
    """Branch the checkpoint at `path`; print a table, write JSONL and a figure. Collective: every rank must call.

    Raises:
        ConfigError: if there is no checkpoint, or such branches cannot be trained.
    """
    trunk = find_checkpoint(path)
    run, out = trunk.run, Path(options.out) if options.out is not None else trunk.folder.path
    if Can.REPEAT not in run.engine.can:
        raise ConfigError(
            f"probe-batch compares branches of a checkpoint, and with engine.kind={run.engine.kind} no two branches "
            "see the same delays: give it a run of engine.kind=torch"
        )
    with joined(run.engine.device, run.launch.timeout_s, alone=run.engine.needs_group) as world:
        console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, quiet=world.rank > 0)
        world.on_rank0(lambda: check_folder(out, key_of(options.out)))
        for damage in trunk.damaged:
            console.print(f"damaged and not used: {damage}")
        seed_generators(run.run.seed)
        task = world.on_all_ranks(lambda: run.task.build(run.model))
        schedule = replace(run.controller(world.size), epoch=size_of(task.train), weights=None)
        samples, powers = resolve(options, trunk, schedule.epoch, samples_left(trunk, schedule))
        branches: list[BranchResult] = []
        with linked_checkpoint(trunk, out, world) as folder:
            for k in powers:
                growth = Branch(start=k * trunk.batch, trunk=schedule, gain=lr_factor(options.rule, run.optimizer, k))
                branches.append(train_branch(trunk, growth, samples, task, folder, world))
                console.print(_line(branches[-1]))
        if world.rank == 0:
            _report(branches, trunk, options, out)


@contextmanager
def linked_checkpoint(trunk: Trunk, out: Path, world: World) -> Iterator[RunFolder]:
    """Make a run's folder below `out` that holds the checkpoint, as hard links if possible. Delete it afterwards."""

    with scratch(out, ".branches-", world) as folder:
        target = folder.checkpoints / trunk.checkpoint.name

        def link() -> None:
            with storing(target):
                shutil.copytree(trunk.checkpoint, target, copy_function=_link)

        world.on_rank0(link)
        yield folder


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def train_branch(
    trunk: Trunk, growth: Branch, samples: int, task: Task, folder: RunFolder, world: World
) -> BranchResult:
    """Train one branch. Only rank 0 has its losses in the result. Collective: every rank must call."""
    run, began = trunk.run, time.monotonic()
    budget = Budget(samples=trunk.progress.ledger.applied + samples)
    active = growth.trunk.active and growth.trunk.active.held(trunk.progress, growth.trunk.whole_axis)
    controller = replace(growth.trunk, growth=growth, budget=budget, stages=Stages(), active=active, sparsity=None)
    controller.check(trunk.progress)
    recorder, result = trained(run, controller, task, folder, world)
    return _result(trunk, growth, recorder, result, time.monotonic() - began)


def _result(trunk: Trunk, growth: Branch, recorder: Recorder, result: Result | None, seconds: float) -> BranchResult:
    """Return the result of a branch. `result` is None if it diverged."""
    start, updates = trunk.progress, recorder.updates
    curve = [(e["samples"] - start.samples, math.inf if e["loss"] is None else e["loss"]) for e in updates]
    return BranchResult(
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


def _line(branch: BranchResult) -> str:
    loss = f"training loss {branch.loss:.4f}" if math.isfinite(branch.loss) else "diverged"
    return (
        f"{branch.k} × the batch: {counted(branch.updates, 'update')} of {branch.batch}, {loss}, {branch.seconds:.1f} s"
    )


def _report(branches: Sequence[BranchResult], trunk: Trunk, options: ProbeOptions, out: Path) -> None:
    """Print the table and the critical batches; write JSONL and the figure into the folder `out`."""
    losses = {"training": {b.k: b.loss for b in branches}, "test": {b.k: b.test_loss for b in branches}}
    if any(math.isnan(loss) for loss in losses["test"].values()):
        del losses["test"]
    answers = {kind: largest_no_worse(by_k, options.tolerance) for kind, by_k in losses.items()}
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(branches, losses), soft_wrap=False)
    for kind, k in answers.items():
        more = "; a larger one may be too (--up-to)" if k == branches[-1].k else ""
        batch = f"{k * trunk.batch} = {k} × {trunk.batch}"
        console.print(f"largest batch no worse in {kind} loss, within {options.tolerance:g}: {batch}{more}")
    name = f"probe-batch-{trunk.checkpoint.name}"
    facts = {"checkpoint": trunk.checkpoint.name, "rule": options.rule, "tolerance": options.tolerance}
    result = {"event": "result", **facts, **{f"{kind}_batch": k * trunk.batch for kind, k in answers.items()}}
    lines = [*({"event": "branch", **_numbers(branch)} for branch in branches), result]
    with storing(out, key_of(options.out)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        title = f"{trunk.folder.path.name}, {trunk.checkpoint.name}"
        figure(branches, title, answers, options.tolerance).savefig(out / f"{name}.png")
    cost = sum(branch.evaluations for branch in branches)
    console.print(f"{counted(cost, 'gradient evaluation')}; wrote {out / name}.jsonl and {name}.png", markup=False)


def _numbers(branch: BranchResult) -> dict[str, Any]:
    """Return a branch as a line of JSONL has it: without its curve, None for numbers that are not finite."""
    values = asdict(branch)
    del values["curve"]
    return {key: finite(value) for key, value in values.items()}


def _table(branches: Sequence[BranchResult], losses: Mapping[str, Mapping[int, float]]) -> Table:
    """Return a table with a row per branch. Each loss has its difference from the best of all smaller batches."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("k", "batch", "lr", "updates", *(f"{kind} loss" for kind in losses)):
        table.add_column(name, justify="right")
    for branch in branches:
        compared = [_compared(by_k, branch.k) for by_k in losses.values()]
        table.add_row(f"{branch.k}", f"{branch.batch}", f"{branch.lr:.4g}", f"{branch.updates}", *compared)
    return table


def _compared(losses: Mapping[int, float], k: int) -> str:
    smaller = [loss for other, loss in losses.items() if other < k and math.isfinite(loss)]
    if not math.isfinite(losses[k]):
        return "diverged"
    return f"{losses[k]:.4f} ({losses[k] - min(smaller):+.4f})" if smaller else f"{losses[k]:.4f}"
