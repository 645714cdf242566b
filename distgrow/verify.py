"""Verification for users: one update over several factorisations of its batch must give the same parameters."""

import copy
import math
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from distgrow.config.run import Run
from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.core.plan import Plan, split
from distgrow.core.progress import Progress
from distgrow.data.dataset import size_of
from distgrow.data.loader import DirectLoader
from distgrow.data.seeding import seed_generators
from distgrow.data.stream import open_stream
from distgrow.distributed.world import World, joined
from distgrow.engine.ability import Can
from distgrow.engine.objective import SingleRow, WeightedLoss
from distgrow.engine.spec import Torch
from distgrow.engine.torch import TorchEngine
from distgrow.optim.direction import real
from distgrow.tasks.task import Task
from distgrow.training.first_rate import first_rate

#: Fewest samples of the batch that is split.
LEAST = 8
#: Largest relative difference of the parameters, by precision.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 1e-1}


_REASONS = {
    nn.modules.batchnorm._BatchNorm: "BatchNorm's statistics are those of the micro-batch: model.norm=group does not "
    "depend on it",
}


def without_dropout(model: nn.Module) -> None:
    """Switch dropout off in torch's own modules. `draws` finds out whatever else a model draws."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0


def factorisations(batch: int) -> list[tuple[int, int]]:
    """Return at least five pairs (world, max_micro) for a batch of at least 8, ragged ones among them."""
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
    """Return all parameters, flat, after one update of a copy of model and loss, one rank's part after the other."""
    model, loss = (
        copy.deepcopy((task.model, task.loss))
        if isinstance(task.loss, nn.Module)
        else (copy.deepcopy(task.model), task.loss)
    )
    without_dropout(model)
    positions = open_stream(task.train, seed=run.run.seed, collate=task.collate)
    with joined(run.engine.device) as world:
        alone = World(device=world.device)
        engine = TorchEngine(model, loss, spec=plain(run), optimizer=run.optimizer, world=alone, items=task.items)
        weight = 0.0
        for rank in range(plan.world):
            seed_generators(plan.seed, world.device)
            loader = DirectLoader(positions, rank)
            stats = engine.accumulate(plan, loader.draw(Progress(), plan), rank=rank)
            weight += stats.weight
            if stats.failed:
                raise TrainingFailed(
                    f"memory does not hold micro-batches of {counted(plan.micro, 'row')}; lower engine.max_micro"
                )
        parameters = WeightedLoss(model, loss).trained()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= plan.world if task.items is None else weight  # as engines do over their ranks
        engine.step(plan)
    return torch.cat([real(parameter.detach()).double().flatten().cpu() for parameter in parameters])


def tried(run: Run, task: Task, plan: Plan) -> torch.Tensor | None:
    """Return what `updated` does, None if BatchNorm cannot train on micro-batches as small as the plan's."""
    try:
        return updated(run, task, plan)
    except SingleRow:
        return None


def draws(run: Run, task: Task, plan: Plan) -> bool:
    """Return whether an update depends on random numbers that model or loss draw, beside dropout."""
    one, other = (tried(run, task, replace(plan, seed=seed)) for seed in (1, 2))
    return one is not None and other is not None and not torch.equal(one, other)


def plain(run: Run) -> Torch:
    """Return the engine that splits are verified on: the run's own, or plain torch in place of DeepSpeed's."""
    given = run.engine
    return given.model_copy(update={"delay": 0}) if isinstance(given, Torch) else Torch(device=given.device)


def verify(run: Run) -> bool:
    """Print the relative parameter difference of every factorisation; return whether all are within the tolerance."""
    if Can.REPEAT not in run.engine.can:
        raise ConfigError(
            f"engine.kind={run.engine.kind} applies gradients in the order in which they come, so no two runs are "
            "equal and there is nothing to verify; verify the model and its loss with engine.kind=torch"
        )
    run = run.with_rate(first_rate(run)) if run.lr.unknown else run  # whatever the rate, updates must agree
    seed_generators(run.run.seed)
    task = run.task.build(run.model)
    first = run.controller(1).plan(Progress())
    first = replace(first, batch=max(first.batch, min(LEAST, size_of(task.train))))
    parameters = WeightedLoss(task.model, task.loss).trained()
    start = torch.cat([real(parameter.detach()).double().flatten() for parameter in parameters])
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("world × micro × accum", "relative difference", "of the update"):
        table.add_column(name, justify="right")
    worst, reference = 0.0, None
    for world, max_micro in factorisations(first.batch):
        micro, accum = split(first.batch, world, max_micro)
        plan = replace(first, world=world, micro=micro, accum=accum)
        after = tried(run, task, plan)
        if after is None:
            worst = math.inf
            table.add_row(f"{world} × {micro} × {accum}", "cannot train", "")
            continue
        reference = after if reference is None else reference
        apart = (after - reference).norm()
        difference = float(apart / reference.norm())
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
        table.add_row(f"{world} × {micro} × {accum}", f"{difference:.2e}", f"{apart / (reference - start).norm():.2e}")
    reasons = [] if worst <= TOLERANCE[plain(run).precision] else _reasons(run, task, first)
    return _reported(run, table, worst, reasons)


def _reasons(run: Run, task: Task, plan: Plan) -> list[str]:
    """Return why splits of the batch may differ."""
    modules = list(task.model.modules())
    found = [reason for kind, reason in _REASONS.items() if any(isinstance(module, kind) for module in modules)]
    if run.optimizer.goes_by_parts:
        found.append(f"optimizer.kind={run.optimizer.name} goes by the gradients of micro-batches: verify with another")
    if draws(run, task, plan):
        found.append("model or loss draws random numbers anew for every rank and micro-batch: verify without that")
    return found


def _reported(run: Run, table: Table, worst: float, reasons: list[str]) -> bool:
    precision = plain(run).precision
    limit = TOLERANCE[precision]
    console = Console(highlight=False, soft_wrap=True)
    console.print(table, soft_wrap=False)
    console.print(f"largest relative parameter difference: {worst:.3e} ({precision}; at most {limit:g})")
    for reason in reasons:
        console.print(reason)
    return worst <= limit
