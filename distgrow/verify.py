"""The proof that users can run: one update over several factorisations of its batch gives the same parameters."""

import copy
import math
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from distgrow.config.run import Run
from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.core.plan import Plan, split
from distgrow.core.progress import Progress
from distgrow.data.loader import DirectLoader
from distgrow.data.seeding import seed_generators
from distgrow.data.stream import SampleStream
from distgrow.distributed.world import World, joined
from distgrow.engine.spec import Torch
from distgrow.engine.torch import TorchEngine
from distgrow.tasks.task import Task

#: Samples of the batch that is split, at least.
LEAST = 8
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 1e-1}


_REASONS = {
    nn.modules.batchnorm._BatchNorm: "BatchNorm's statistics are those of the micro-batch: model.norm=group does not "
    "depend on it",
    nn.modules.dropout._DropoutNd: "Dropout draws anew for every rank and micro-batch: verify without it",
}


def factorisations(batch: int) -> list[tuple[int, int]]:
    """At least five (world, max_micro) pairs for a batch of at least 8, ragged ones among them."""
    wanted = [(1, batch), (1, 7), (2, batch), (2, 3), (3, 5), (4, 2), (5, batch), (7, 2), (8, 3), (batch, 1)]
    fitting: dict[tuple[int, int, int], tuple[int, int]] = {}
    for world, max_micro in wanted:
        try:
            micro, accum = split(batch, world, max_micro)
        except ConfigError:
            continue
        fitting.setdefault((world, micro, accum), (world, max_micro))
    return list(fitting.values())


def updated(run: Run, task: Task, plan: Plan) -> torch.Tensor:
    """All parameters, flat, after one update of a copy of the model: every rank's part, one rank after the other."""
    model = copy.deepcopy(task.model)
    positions = SampleStream(task.train, seed=run.run.seed, collate=task.collate)
    with joined(run.engine.device) as world:
        engine = TorchEngine(
            model, task.loss, spec=plain(run), optimizer=run.optimizer, world=World(device=world.device)
        )
        for rank in range(plan.world):
            loader = DirectLoader(positions, rank)
            if engine.accumulate(plan, loader.draw(Progress(), plan), rank=rank).failed:
                raise TrainingFailed(f"memory does not hold micro-batches of {plan.micro} rows; lower engine.max_micro")
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= plan.world  # as DDP's all-reduce averages over ranks
        engine.step(plan.lr)
    return torch.cat([parameter.detach().double().flatten().cpu() for parameter in model.parameters()])


def plain(run: Run) -> Torch:
    """The engine that splits are verified on: the run's own, or plain torch in place of DeepSpeed's."""
    return run.engine if isinstance(run.engine, Torch) else Torch(device=run.engine.device)


def verify(run: Run) -> bool:
    """Print the relative parameter difference of every factorisation; whether all are within the tolerance."""
    seed_generators(run.run.seed)
    task = run.task.build(run.model)
    first = run.controller(1).plan(Progress())
    first = replace(first, batch=max(first.batch, min(LEAST, len(task.train))))  # a small one has few factorisations
    start = torch.cat([parameter.detach().double().flatten() for parameter in task.model.parameters()])
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("world × micro × accum", "relative difference", "of the update"):
        table.add_column(name, justify="right")
    worst, reference = 0.0, None
    for world, max_micro in factorisations(first.batch):
        micro, accum = split(first.batch, world, max_micro)
        after = updated(run, task, replace(first, world=world, micro=micro, accum=accum))
        reference = after if reference is None else reference
        apart = (after - reference).norm()
        difference = float(apart / reference.norm())
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
        table.add_row(f"{world} × {micro} × {accum}", f"{difference:.2e}", f"{apart / (reference - start).norm():.2e}")
    return _told(run, table, worst, task.model)


def _told(run: Run, table: Table, worst: float, model: nn.Module) -> bool:
    precision = plain(run).precision
    limit = TOLERANCE[precision]
    console = Console(highlight=False, soft_wrap=True)
    console.print(table, soft_wrap=False)
    console.print(f"largest relative parameter difference: {worst:.3e} ({precision}; at most {limit:g})")
    for kind, reason in _REASONS.items():
        if worst > limit and any(isinstance(module, kind) for module in model.modules()):
            console.print(reason)
    return worst <= limit
