"""What layer-wise steps give, and what they cost.

First a ResNet-8 on the digits as pictures at one large batch: loss on held-out pictures by LARS and CLARS, with warm-up
and without, over a grid of peak learning rates. Then the time of an update with LARS, LAMB or CLARS over one with
AdamW, paired.
"""

import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from loops import build, build_job
from overhead import distgrow_block
from paired import Report, Spread, arguments, interleave, keep, ratio, show, tell
from sfo_tasks import cross_entropy, scores

from distgrow.core.budget import Budget
from distgrow.core.errors import Diverged
from distgrow.core.lr import LR, Cosine
from distgrow.data.datasets import digits
from distgrow.distributed.world import joined
from distgrow.engine.spec import Torch
from distgrow.growth.constant import Constant
from distgrow.optim import OptimizerSpec
from distgrow.optim.adamw import AdamW
from distgrow.optim.clars import CLARS
from distgrow.optim.lamb import LAMB
from distgrow.optim.lars import LARS
from distgrow.tasks.architectures import Images, ResNet
from distgrow.training.fit import fit
from distgrow.training.spec import Evaluation, RunSpec

MICRO, WARM, DECAY = 16, 0.1, 5e-4
#: A rate at which parameters stay where they are while times are taken: models that learn unlike have other zeros.
STILL = 1e-9
#: Name → optimizer and target of its time over AdamW's.
COSTS: dict[str, tuple[OptimizerSpec, float]] = {
    "LARS": (LARS(weight_decay=DECAY), 1.03),
    "LAMB": (LAMB(weight_decay=0.01), 1.03),
    "CLARS": (CLARS(weight_decay=DECAY), 1.05),
}
#: Name → optimizer and its peak learning rates; the smallest and the largest are worse than those between.
GRID: dict[str, tuple[OptimizerSpec, Sequence[float]]] = {
    "LARS": (LARS(weight_decay=DECAY, trust=0.01), (1, 2, 4, 8, 16)),
    "CLARS": (CLARS(weight_decay=DECAY, trust=0.01), (2, 4, 8, 16, 32)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """What one run has reached."""

    optimizer: str
    lr: float
    warmup: float
    seed: int
    batch: int
    updates: int
    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time of an update over that of one with AdamW."""

    optimizer: str
    accum: int
    over_adamw: Spread
    target: float


def accuracies(folder: Path, *, seeds: int, epochs: int, batch: int, rates: int) -> Iterator[Accuracy]:
    """Train by every optimizer, peak, warm-up and seed."""
    for name, (spec, peaks) in GRID.items():
        for peak, warmup, seed in product(peaks[:rates], (0.0, WARM), range(seeds)):
            place = folder / f"{name}-{peak}-{warmup}-{seed}"
            yield trained(name, spec, peak, warmup, seed, place, epochs=epochs, batch=batch)


def trained(
    name: str, spec: OptimizerSpec, peak: float, warmup: float, seed: int, folder: Path, *, epochs: int, batch: int
) -> Accuracy:
    """Train once; a run that diverges has no loss."""
    train, test = digits()
    torch.manual_seed(seed)
    model = ResNet().build(Images(channels=1, height=8, width=8, classes=10))
    habits = RunSpec(dir=str(folder), seed=seed, log_every=10**6, max_skips=1, eval=Evaluation(every_epochs=1e6))
    loss = accuracy = math.nan
    try:
        result = fit(
            model, cross_entropy, train, test=test, metrics=scores, growth=Constant(start=batch),
            budget=Budget(epochs=epochs), optimizer=spec, lr=LR(base=peak, decay=Cosine(warmup=warmup)),
            engine=Torch(device="cpu", max_micro=128), run=habits,
        )  # fmt: skip
        loss, accuracy = result.metrics["loss"], result.metrics["accuracy"]
    except Diverged as error:
        tell(f"{name} at {peak}: {str(error).splitlines()[0]}")
    return Accuracy(
        optimizer=name, lr=peak, warmup=warmup, seed=seed, batch=batch, updates=epochs * len(train) // batch,
        loss=loss, accuracy=accuracy,
    )  # fmt: skip


def costs(folder: Path, *, rounds: int) -> Iterator[Cost]:
    """Time blocks of the CNN's updates with each optimizer and with AdamW, taking turns."""
    with joined("cpu", alone=True) as world:
        for accum, updates in ((1, 8), (4, 2)):
            specs = {"AdamW": AdamW(), **{name: spec for name, (spec, _) in COSTS.items()}}
            jobs = {
                name: build_job(
                    build("cnn"), world, Constant(start=MICRO * accum), optimizer=spec, lr=STILL,
                    engine=Torch(device="cpu", max_micro=MICRO), folder=folder / f"{name}-{accum}",
                )
                for name, spec in specs.items()
            }  # fmt: skip
            seconds = interleave({name: distgrow_block(job, updates, world) for name, job in jobs.items()}, rounds)
            for job in jobs.values():
                job.events.tracker.close()
            for name, (_, target) in COSTS.items():
                over = ratio(seconds[name], seconds["AdamW"])
                yield Cost(optimizer=name, accum=accum, over_adamw=over, target=target)


def accuracy_report(rows: Sequence[Accuracy]) -> Report:
    """Return a row for every optimizer and warm-up, with a column for each peak of any grid."""
    peaks = sorted({row.lr for row in rows})
    table: list[list[str]] = []
    for name, warmup in product(GRID, (0.0, WARM)):
        cells = list[str]()
        for peak in peaks:
            losses = sorted(
                row.loss if math.isfinite(row.loss) else math.inf
                for row in rows
                if (row.optimizer, row.warmup, row.lr) == (name, warmup, peak)
            )
            if not losses:
                cells.append("–")
                continue
            cells.append(f"{statistics.median(losses):.3f} ({losses[0]:.3f} … {losses[-1]:.3f})")
        table.append([name, f"{warmup:.0%}" if warmup else "none", *cells])
    return Report(
        title=f"Held-out loss of ResNet-8 on the digits, batch {rows[0].batch}, {rows[0].updates} updates, by peak "
        "learning rate: median of seeds (least … greatest)",
        columns=["optimizer", "warm-up", *[f"{peak:g}" for peak in peaks]],
        rows=table,
    )


def cost_report(rows: Sequence[Cost]) -> Report:
    """Return the table of times."""
    return Report(
        title="Time of an update of the CNN over that with AdamW: median of paired ratios (quartiles)",
        columns=["optimizer", "micro × accum", "÷ AdamW", "target"],
        rows=[
            [
                row.optimizer, f"{MICRO} × {row.accum}", str(row.over_adamw),
                f"≤ {row.target} {'met' if row.over_adamw.median <= row.target else 'missed'}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def main() -> None:
    """Measure, keep, show."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    size = {"seeds": 1, "epochs": 2, "rates": 1} if options.quick else {"seeds": 2, "epochs": 50, "rates": 5}
    with tempfile.TemporaryDirectory() as folder:
        found = list(accuracies(Path(folder), batch=512, **size))
        spent = list(costs(Path(folder), rounds=4 if options.quick else 60))
    rows: list[Any] = [*found, *spent]
    reports = [accuracy_report(found), cost_report(spent)]
    if options.jsonl:
        keep(options.jsonl, rows)
    show(reports, markdown=options.markdown)


if __name__ == "__main__":
    main()
