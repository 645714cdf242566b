"""What a batch and a delay cost: evaluations and updates to a target loss on the digits.

    python benchmarks/staleness.py [--plots FOLDER]

Fixed delays are engine.delay; asynchronous workers are Ray actors of this host. Plain SGD at a constant learning rate,
the best of a grid of powers of two for each batch and delay. The curve of the theory has two constants, which are
fitted to the runs without a delay alone: evaluations = S·(1 + (τ + 1)·b/C), C the critical batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from matplotlib.figure import Figure
from paired import Report, arguments, keep, show

from distgrow.core.plan import Plan
from distgrow.distributed.world import World
from distgrow.engine.protocol import Engine
from distgrow.engine.spec import Async, Torch
from distgrow.optim.sgd import SGD
from distgrow.report.plots import COLOURS
from distgrow.tasks.builtin import Digits

BATCHES, DELAYS, WORKERS = (4, 16, 64, 256), (0, 1, 3, 7, 15), (1, 2, 4)
TARGET, SEEDS, MOST, MOST_UPDATES = 0.2, 2, 160_000, 6_000
#: Evaluations between two looks at the loss, the batch with asynchronous workers, and a loss that never comes down.
LOOK, WORKED_AT, LOST = 256, 16, 10.0
#: The first learning rate that is tried, as a power of two, and the lowest and highest.
FIRST, LOWEST, HIGHEST = -2, -7, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What it took to the target."""

    batch: int
    delay: float  #: of asynchronous workers the mean
    workers: int  #: 0: a fixed delay
    lr: float
    evaluations: float  #: mean over seeds; inf: some seed has not come there
    updates: float


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """The training set as two tensors."""
    train = Digits().build(None).train
    return torch.stack([train[k][0] for k in range(len(train))]), torch.tensor(
        [int(train[k][1]) for k in range(len(train))]
    )


def took(
    spec: Torch | Async, data: tuple[torch.Tensor, torch.Tensor], batch: int, lr: float, seed: int, most: float
) -> Any:
    """(Evaluations, updates, mean delay) until the loss over the training set is at most TARGET; inf if never."""
    torch.manual_seed(seed)
    task = Digits().build(None)
    engine: Engine = spec.build(task.model, task.loss, metrics=None, optimizer=SGD(), world=World())
    numbers, order, delays = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long), list[int]()
    updates, next_look = 0, LOOK
    try:
        while updates < min(most / batch, MOST_UPDATES):
            while len(order) < batch:
                order = torch.cat([order, torch.randperm(len(data[0]), generator=numbers)])
            at, order = order[:batch], order[batch:]
            plan = Plan(batch=batch, world=1, micro=batch, accum=1, lr=lr, stage=0, seed=updates)
            delays.append(engine.update(plan, [(data[0][at], data[1][at])]).delay)
            updates += 1
            if updates * batch >= next_look:
                next_look = updates * batch + max(LOOK, updates * batch // 25)
                with torch.no_grad():
                    loss = float(task.loss(task.model, data))
                if loss <= TARGET:
                    return updates * batch, updates, sum(delays) / len(delays)
                if not loss < LOST:
                    break
        return math.inf, math.inf, 0.0
    finally:
        engine.close()


def cost(data: Any, batch: int, delay: int, power: int, seeds: int, most: float) -> Cost:
    """What a fixed delay takes at a learning rate of 2^power."""
    spec = Torch(delay=delay, max_micro=1024)
    found = [took(spec, data, batch, 2.0**power, seed, most)[:2] for seed in range(seeds)]
    evaluations, updates = np.mean(found, axis=0)
    return Cost(batch=batch, delay=delay, workers=0, lr=2.0**power, evaluations=evaluations, updates=updates)


def best(data: Any, batch: int, delay: int, start: int, seeds: int, most: int) -> Cost:
    """The least that a fixed delay takes: learning rates are doubled and halved until neither helps."""
    known: dict[int, Cost] = {}

    def at(power: int) -> Cost:
        if power not in known:
            least = min((cost.evaluations for cost in known.values()), default=math.inf)
            known[power] = cost(data, batch, delay, power, seeds, min(most, 1.5 * least))  # longer is not the best
        return known[power]

    tried = sorted(range(LOWEST, HIGHEST + 1), key=lambda power: abs(power - start))
    power = next((power for power in tried if math.isfinite(at(power).evaluations)), start)
    while power < HIGHEST and at(power + 1).evaluations < at(power).evaluations:
        power += 1
    while power > LOWEST and at(power - 1).evaluations < at(power).evaluations:
        power -= 1
    return at(power)


def fixed(data: Any, batches: Sequence[int], delays: Sequence[int], seeds: int, most: int) -> Iterator[Cost]:
    """The best of each batch and delay; a search begins at the best learning rate of the delay before."""
    for batch in batches:
        start = FIRST
        for delay in delays:
            found = best(data, batch, delay, start, seeds, most)
            start = round(math.log2(found.lr))
            yield found


def asynchronous(data: Any, workers: Sequence[int], costs: Sequence[Cost], seeds: int, most: int) -> Iterator[Cost]:
    """What workers take at the best learning rate of the delay that they would have in turn."""
    ray.init(address="local", num_cpus=max(workers), include_dashboard=False, log_to_driver=False)
    for number in workers:
        like = min((c for c in costs if c.batch == WORKED_AT), key=lambda c: abs(c.delay - (number - 1)))
        spec = Async(workers=number, max_micro=1024)
        found = [took(spec, data, WORKED_AT, like.lr, seed, most) for seed in range(seeds)]
        evaluations, updates, delay = np.mean(found, axis=0)
        yield Cost(
            batch=WORKED_AT, delay=delay, workers=number, lr=like.lr, evaluations=evaluations, updates=updates
        )  # fmt: skip
    ray.shutdown()


def fitted(costs: Sequence[Cost]) -> tuple[float, float]:
    """(S, C) of S·(1 + b/C), the least squares of the logarithms over runs without a delay."""
    plain = [cost for cost in costs if not cost.delay and not cost.workers and math.isfinite(cost.evaluations)]
    batches, logs = np.array([c.batch for c in plain]), np.log([c.evaluations for c in plain])
    critical = np.geomspace(1, 10_000, 2000)
    curves = np.log1p(batches / critical[:, None])
    levels = (logs - curves).mean(1)
    k = int(((logs - curves - levels[:, None]) ** 2).sum(1).argmin())
    return float(np.exp(levels[k])), float(critical[k])


def draw(folder: Path, costs: Sequence[Cost], level: float, critical: float) -> None:
    """Evaluations against (τ + 1)·b, and updates against τ + 1 for each batch, with the curve of the theory."""
    figure = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    batches = sorted({cost.batch for cost in costs})
    ages = np.geomspace(1, 1 + max(cost.delay for cost in costs), 100)
    sizes = np.geomspace(min(batches), max(batches) * ages[-1], 200)
    left.plot(sizes, level * (1 + sizes / critical), color="black", linewidth=1.2, label="S·(1 + (τ + 1)·b/C)")
    left.axvline(critical, color="black", linewidth=0.8, linestyle=":", label=f"C = {critical:.0f}")
    for batch, colour in zip(batches, COLOURS, strict=False):
        own = [cost for cost in costs if cost.batch == batch and not cost.workers]
        look: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 5, "linewidth": 0.8}
        left.plot([(c.delay + 1) * batch for c in own], [c.evaluations for c in own], label=f"b = {batch}", **look)
        right.plot([c.delay + 1 for c in own], [c.updates for c in own], label=f"b = {batch}", **look)
        right.plot(ages, level * (1 + ages * batch / critical) / batch, color=colour, linestyle="--", linewidth=0.8)
    worked = [cost for cost in costs if cost.workers]
    star: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 9, "linestyle": ""}
    label = f"asynchronous workers, b = {WORKED_AT}"
    left.plot([(c.delay + 1) * c.batch for c in worked], [c.evaluations for c in worked], label=label, **star)
    right.plot([c.delay + 1 for c in worked], [c.updates for c in worked], **star)
    left.set(xscale="log", yscale="log", xlabel="(τ + 1)·b", ylabel=f"evaluations to a loss of {TARGET:g}")
    right.set(xscale="log", yscale="log", xlabel="τ + 1", ylabel=f"updates to a loss of {TARGET:g}")
    for axes in (left, right):
        axes.grid(alpha=0.3, linewidth=0.5)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "staleness.png")


def reports(costs: Sequence[Cost], level: float, critical: float) -> list[Report]:
    """The tables: fixed delays, and asynchronous workers."""
    delays = sorted({cost.delay for cost in costs if not cost.workers})
    table = {(cost.batch, cost.delay): cost for cost in costs if not cost.workers}
    grid = [
        [f"{batch}", *(cell(table[batch, delay], level, critical) for delay in delays)]
        for batch in sorted({cost.batch for cost in table.values()})
    ]
    title = f"Evaluations to a training loss of {TARGET:g} (÷ the curve's); S = {level:,.0f}, C = {critical:.0f}"
    worked = [
        [f"{c.workers}", f"{c.delay:.2f}", f"{c.lr:g}", f"{c.evaluations:,.0f}", f"{c.updates:,.0f}"]
        for c in costs if c.workers
    ]  # fmt: skip
    return [
        Report(title=title, columns=["b", *(f"τ = {delay}" for delay in delays)], rows=grid),
        Report(
            title=f"Asynchronous workers at b = {WORKED_AT}",
            columns=["workers", "mean τ", "η", "evaluations", "updates"],
            rows=worked,
        ),
    ]


def cell(cost: Cost, level: float, critical: float) -> str:
    """Evaluations, what they are of the curve's, and the learning rate."""
    if math.isinf(cost.evaluations):
        return f"> {MOST:,}"
    curve = level * (1 + (cost.delay + 1) * cost.batch / critical)
    return f"{cost.evaluations:,.0f} ({cost.evaluations / curve:.2f}; η = {cost.lr:g})"


def main() -> None:
    """Measure, draw, and show the tables."""
    parser = arguments(__doc__)
    parser.add_argument("--plots", type=Path, help="put the plot into this folder")
    options = parser.parse_args()
    quick = options.quick
    batches, delays, workers = ((16, 256), (0, 1), (1, 2)) if quick else (BATCHES, DELAYS, WORKERS)
    seeds, most = (1, 8_000) if quick else (SEEDS, MOST)
    data = rows()
    costs = list(fixed(data, batches, delays, seeds, most))
    costs += asynchronous(data, workers, costs, 1 if quick else seeds, most)
    if options.jsonl:
        keep(options.jsonl, costs)
    level, critical = fitted(costs)
    if options.plots:
        draw(options.plots, costs, level, critical)
    show(reports(costs, level, critical), markdown=options.markdown)


if __name__ == "__main__":
    main()
