"""What layer-wise steps give, and what they cost.

First ResNet-8 on CIFAR-10 at one large batch: accuracy on held-out images by LARS and CLARS, with warm-up and without,
over a grid of peak learning rates. Then the time of an update with LARS, LAMB or CLARS over one with AdamW, paired.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loops import build, build_job
from overhead import distgrow_block
from paired import Report, Spread, arguments, interleave, keep, ratio, show, tell
from sfo_tasks import cifar

from distgrow.core.budget import Budget
from distgrow.core.errors import Diverged
from distgrow.core.lr import LR, Cosine
from distgrow.distributed.world import joined
from distgrow.engine.spec import Torch
from distgrow.growth.constant import Constant
from distgrow.optim import OptimizerSpec
from distgrow.optim.adamw import AdamW
from distgrow.optim.clars import CLARS
from distgrow.optim.lamb import LAMB
from distgrow.optim.lars import LARS
from distgrow.training.fit import fit
from distgrow.training.spec import RunSpec

MICRO, WARM, DECAY = 16, 0.1, 5e-4
#: Name → optimizer and target of its time over AdamW's.
COSTS: dict[str, tuple[OptimizerSpec, float]] = {
    "LARS": (LARS(weight_decay=DECAY), 1.03),
    "LAMB": (LAMB(weight_decay=0.01), 1.03),
    "CLARS": (CLARS(weight_decay=DECAY), 1.05),
}
#: Name → optimizer, its peak learning rates, and shares of the budget for warm-up.
GRID: dict[str, tuple[OptimizerSpec, Sequence[float]]] = {
    "LARS": (LARS(weight_decay=DECAY, trust=0.01), (1, 2, 4, 8)),
    "CLARS": (CLARS(weight_decay=DECAY, trust=0.01), (2, 4, 8, 16)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """What one run has reached."""

    optimizer: str
    lr: float
    warmup: float
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


def accuracies(folder: Path, data: str, *, samples: int, epochs: int, batch: int, rates: int) -> Iterator[Accuracy]:
    """Train by every optimizer, peak and warm-up."""
    for name, (spec, peaks) in GRID.items():
        for peak in peaks[:rates]:
            for warmup in (0.0, WARM):
                torch.manual_seed(0)
                task = cifar(data, samples, samples // 5)
                place = RunSpec(dir=str(folder / f"{name}-{peak}-{warmup}"), log_every=10**6, max_skips=1)
                loss = accuracy = float("nan")
                updates = 0
                try:
                    result = fit(
                        task.model, task.loss, task.train, test=task.test, metrics=task.metrics,
                        growth=Constant(start=batch), budget=Budget(epochs=epochs), optimizer=spec,
                        lr=LR(base=peak, decay=Cosine(warmup=warmup)), engine=Torch(device="cpu", max_micro=128),
                        run=place.model_copy(update={"eval": place.eval.model_copy(update={"every_epochs": 10.0**6})}),
                    )  # fmt: skip
                    loss, accuracy = result.metrics["loss"], result.metrics["accuracy"]
                    updates = result.progress.step
                except Diverged as error:
                    tell(f"{name} at {peak}: {str(error).splitlines()[0]}")
                yield Accuracy(
                    optimizer=name, lr=peak, warmup=warmup, batch=batch, updates=updates, loss=loss, accuracy=accuracy
                )


def costs(folder: Path, *, rounds: int) -> Iterator[Cost]:
    """Time blocks of the CNN's updates with each optimizer and with AdamW, taking turns."""
    with joined("cpu", alone=True) as world:
        for accum, updates in ((1, 8), (4, 2)):
            specs = {"AdamW": AdamW(), **{name: spec for name, (spec, _) in COSTS.items()}}
            jobs = {
                name: build_job(
                    build("cnn"), world, Constant(start=MICRO * accum), optimizer=spec,
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
    """Return a row for every optimizer and warm-up, with a column for each peak of its own grid."""
    table: list[list[str]] = []
    for name, (_, _) in GRID.items():
        for warmup in (0.0, WARM):
            found = [row for row in rows if (row.optimizer, row.warmup) == (name, warmup)]
            cells = [f"{row.lr:g}: {row.accuracy:.3f}" for row in found]
            table.append([name, f"{warmup:.0%}" if warmup else "none", *cells])
    columns = ["optimizer", "warm-up", *[f"peak {k + 1}" for k in range(max(len(row) for row in table) - 2)]]
    first = rows[0]
    title = (
        f"Held-out accuracy of ResNet-8 on CIFAR-10, batch {first.batch}, {max(row.updates for row in rows)} updates: "
        "peak learning rate and accuracy"
    )
    return Report(title=title, columns=columns, rows=table)


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
    parser = arguments(__doc__)
    parser.add_argument("--data", help="folder of CIFAR-10 in Parquet files; without it the costs alone are measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    reports: list[Report] = []
    rows: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        if options.data is not None:
            size: dict[str, int] = {"samples": 512, "epochs": 1, "batch": 128, "rates": 1}
            if not options.quick:
                size = {"samples": 2048, "epochs": 10, "batch": 256, "rates": 4}
            found = list(accuracies(Path(folder), options.data, **size))
            reports.append(accuracy_report(found))
            rows += found
        spent = list(costs(Path(folder), rounds=4 if options.quick else 100))
        reports.append(cost_report(spent))
        rows += spent
    if options.jsonl:
        keep(options.jsonl, rows)
    show(reports, markdown=options.markdown)


if __name__ == "__main__":
    main()
