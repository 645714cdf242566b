"""Who takes part in the benchmark of time at scale alone: auto with an objective for each W, and wider decays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from scale_cluster import WORKERS, Cluster
from sfo_contestants import Policy, Scale, Values, parts
from sfo_problems import Problem
from sfo_results import Setting

from distgrow.core.errors import ConfigError
from distgrow.growth.objective import Objective

AIMED, WIDE = "auto, objective", "decay, wide"


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Hold what an earlier run of a task has shown, and grids for large batches. Budgets are in epochs."""

    noise: tuple[float, float]  #: B of auto as it is, η₀ 1, at its best budget on one worker: first, last quarter
    samples: int  #: of an epoch
    budgets: Sequence[float]  #: of growth
    wide_batches: Sequence[int]  #: of decays, beyond those of the SFO benchmark
    wide_budgets: Sequence[float]


LARGE, LONGER = 64, (128, 192)  #: from this b₀ on budgets go on by these, as larger batches need more samples
BUDGETS = (8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 64, 96)  #: as many as auto has
KNOWN = {
    "quadratic": Known(
        noise=(38.7, 7728),
        samples=1024,
        budgets=BUDGETS,
        wide_batches=(256, 512, 1024),
        wide_budgets=(30, 60, 90, 120, 180),
    ),
    "digits": Known(
        noise=(25.1, 122),
        samples=1437,
        budgets=BUDGETS,
        wide_batches=(64, 128, 256, 512),
        wide_budgets=(20, 40, 80, 120, 160),
    ),
}


def objective_for(known: Known, cluster: Cluster, workers: int) -> Objective:
    """Return the objective of as many of the workers as can have a row of the first batch."""
    busy = min(workers, known.samples // 4)
    pace = cluster.pace(busy)
    first, last = known.noise
    own = {"noise": first, "noise_at_end": last, "latency_s": pace.latency_s, "samples_per_s": pace.samples_per_s}
    return Objective(workers=busy, most=known.samples, **own)


def within(scale: Scale, budgets: Sequence[float]) -> Sequence[float]:
    """Return the budgets that runs on the task may have, or else its longest: a smoke run has few epochs."""
    return [budget for budget in budgets if budget <= scale.long] or [scale.long]


def aimed(known: Known, cluster: Cluster, scale: Scale) -> Iterator[tuple[str, Values]]:
    """Make auto with b₀ and cap from the cluster; η₀ is one of two, as that of auto."""
    objectives = dict.fromkeys(objective_for(known, cluster, workers) for workers in WORKERS)
    rates = sorted({lr for _, lr in scale.starts}, reverse=True)
    for objective, lr, budget in product(objectives, rates, within(scale, (*known.budgets, *LONGER))):
        growth = {"kind": "auto", "objective": objective.model_dump()}
        decided = objective.decided()
        if budget in LONGER and decided["start"] < LARGE:
            continue
        name = f"W={objective.workers}: b₀={decided['start']} to {decided['cap']}, η₀={lr:g}, {budget:g} epochs"
        yield name, parts(growth, lr, budget, None)


def wide(known: Known, scale: Scale) -> Iterator[tuple[str, Values]]:
    """Make cosine and WSD decays at batches as large as those that growth comes to."""
    decays = {"cosine": {"kind": "cosine"}, "WSD": {"kind": "wsd", "decay": 0.5}}
    rates = sorted({lr for _, lr in scale.starts}, reverse=True)
    for batch, lr, budget, name in product(known.wide_batches, rates, within(scale, known.wide_budgets), decays):
        growth = {"kind": "constant", "start": batch}
        yield f"b={batch} η={lr:g}, {name} of {budget:g} epochs", parts(growth, lr, budget, decay=decays[name])


def at_scale(problem: Problem, cluster: Cluster) -> Problem:
    """Return the task with its decays, with auto, and with both policies of this benchmark.

    Raises:
        ConfigError: Its noise scale is not known here.
    """
    if (known := KNOWN.get(problem.name)) is None:
        raise ConfigError(f"--objective is of the tasks {', '.join(KNOWN)}; {problem.name} has no known noise scale")
    own = (
        Policy(name=WIDE, grid=partial(wide, known), family="decay"),
        Policy(name=AIMED, grid=partial(aimed, known, cluster), tuned=False),
    )
    kept = [policy for policy in problem.policies if policy.family == "decay" or policy.name == "auto"]
    return replace(problem, policies=(*kept, *own))


def suits(setting: Setting, problem: Problem, cluster: Cluster, workers: int) -> bool:
    """Return whether a setting is one for so many workers; only an objective is for some and not for others."""
    if setting.policy != AIMED:
        return True
    wanted = objective_for(KNOWN[problem.name], cluster, workers)
    return all(run.config["growth"]["objective"] == wanted.model_dump() for run in setting.runs)
