"""Whether a pruned model has the loss of its average size: small GPTs of three sizes at five densities, equal compute.

Each size has one budget of compute, which every density gets. The law L = A/N̄^α + B/D^β + E is fitted to the test
losses with the average, the final and the initial number of kernel weights. These models are a thousandth of the
published ones, at one seed each. It also times an update that masks weights over one of a dense model.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loops import build, build_job
from overhead import distgrow_block
from paired import Report, Spread, arguments, interleave, keep, ratio, show, tell

from distgrow import AdamW, Budget, Cosine, RunSpec, Sparsity, Torch, constant, fit, linear_lr
from distgrow.core.spec import Spec
from distgrow.distributed.world import joined
from distgrow.growth.constant import Constant
from distgrow.tasks.architectures import GPT
from distgrow.tasks.builtin import Text
from distgrow.tasks.task import Task
from distgrow.theory.pruning import Law, fit_law
from distgrow.training.spec import Evaluation

SIZES, TARGETS, LENGTH, BATCH, LAYERS = (16, 24, 40), (0.0, 0.2, 0.4, 0.6, 0.8), 32, 32, 2
TOKENS = 10  #: of the compute, for each kernel weight
MICRO, LIMIT = 16, 1.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """One run."""

    width: int
    target: float
    initial: int  #: kernel weights
    average: float
    tokens: int
    compute: float  #: tokens of a dense run that costs as much
    loss: float  #: of the test set


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time of an update with masks over that of one without."""

    micro: int
    accum: int
    over_dense: Spread


def task_of(width: int) -> Task:
    """A small GPT on the sources of Python's standard library."""
    torch.manual_seed(0)
    return Text(length=LENGTH).build(GPT(layers=LAYERS, width=width, heads=2))


def pruned(folder: Path, width: int, target: float, per_weight: float) -> Pruned:
    """Train one model."""
    task, initial = task_of(width), 12 * LAYERS * width**2
    result = fit(
        task.model, task.loss, task.train, test=task.test, metrics=task.metrics, growth=constant(BATCH),
        optimizer=AdamW(beta2=0.95, weight_decay=0.1, clip=1.0), lr=linear_lr(3e-3, decay=Cosine()),
        budget=Budget(compute=round(per_weight * initial / LENGTH)), sparsity=Sparsity(target=target),
        engine=Torch(device="cpu"),
        run=RunSpec(dir=str(folder / f"{width}-{target}"), eval=Evaluation(every_epochs=1e6, rows=2048), log_every=100),
    )  # fmt: skip
    progress = result.progress
    return Pruned(
        width=width, target=target, initial=initial, average=initial * progress.compute / progress.ledger.applied,
        tokens=progress.ledger.applied * LENGTH, compute=progress.compute * LENGTH, loss=result.metrics["loss"],
    )  # fmt: skip


def costs(folder: Path, *, rounds: int) -> Iterator[Cost]:
    """Blocks of the CNN's updates, pruned to half and dense, taking turns."""
    half: dict[str, Sparsity | None] = {"dense": None, "pruned": Sparsity(target=0.5, start=0.0, end=0.01, every=0.5)}
    with joined("cpu", alone=True) as world:
        for accum, updates in ((1, 8), (4, 2)):
            jobs = {
                name: build_job(
                    build("cnn"), world, Constant(start=MICRO * accum),
                    engine=Torch(device="cpu", max_micro=MICRO), folder=folder / f"{name}-{accum}",
                )
                for name in half
            }  # fmt: skip
            for name, sparsity in half.items():
                prune(jobs[name], sparsity)
            seconds = interleave({name: distgrow_block(job, updates, world) for name, job in jobs.items()}, rounds)
            for job in jobs.values():
                job.events.tracker.close()
            yield Cost(micro=MICRO, accum=accum, over_dense=ratio(seconds["pruned"], seconds["dense"]))


def prune(job: Any, sparsity: Spec | None) -> None:
    """Let a run be at its final density from its first update on."""
    if isinstance(sparsity, Sparsity):
        job.engine.prune_by(sparsity)
        job.engine._masks.follow(1 - sparsity.target)


def laws(rows: list[Pruned]) -> dict[str, tuple[Law, float]]:
    """The law by each notion of a model's size."""
    sizes = {
        "average": [row.average for row in rows],
        "final": [row.initial * (1 - row.target) for row in rows],
        "initial": [float(row.initial) for row in rows],
    }
    data, losses = [float(row.tokens) for row in rows], [row.loss for row in rows]
    return {name: fit_law(of, data, losses) for name, of in sizes.items()}


def reports(rows: list[Pruned], times: list[Cost]) -> list[Report]:
    """Return the tables."""
    found = laws(rows) if len(rows) > 3 else {}
    runs = [
        [
            str(row.width), f"{row.target:g}", f"{row.initial:,}", f"{row.average:,.0f}", f"{row.tokens:,}",
            f"{row.compute:,.0f}", f"{row.loss:.4f}",
            f"{found['average'][0].loss(row.average, row.tokens):.4f}" if found else "—",
        ]
        for row in rows
    ]  # fmt: skip
    fits = [
        [name, f"{law.size_factor:.3g}", f"{law.data_factor:.3g}", f"{law.floor:.3g}", f"{rms:.4f}"]
        for name, (law, rms) in found.items()
    ]
    masks = [
        [
            f"{time.micro} × {time.accum}", str(time.over_dense),
            f"≤ {LIMIT} {'met' if time.over_dense.median <= LIMIT else 'missed'}",
        ]
        for time in times
    ]  # fmt: skip
    return [
        Report(
            title="Test loss of small GPTs at equal compute for each width",
            columns=["width", "target", "N", "N̄", "tokens", "compute", "loss", "law"],
            rows=runs,
        ),
        Report(
            title="The law fitted by each notion of size; its error is the root of the mean squared residual",
            columns=["size", "A", "B", "E", "error"],
            rows=fits,
        ),
        Report(
            title="Time of an update of the CNN with masks over a dense one: median of paired ratios (quartiles)",
            columns=["micro × accum", "÷ dense", "target"],
            rows=masks,
        ),
    ]


def main() -> None:
    """Measure, keep, show."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=float, default=TOKENS, help="of the compute, for each kernel weight")
    options = parser.parse_args()
    torch.set_num_threads(1)
    per_weight, sizes = (0.5, SIZES[:1]) if options.quick else (options.tokens, SIZES)
    rows: list[Pruned] = []
    with tempfile.TemporaryDirectory() as folder:
        for width in sizes:
            for target in TARGETS:
                rows.append(pruned(Path(folder), width, target, per_weight))
                tell(f"{width} {target}: {rows[-1].loss:.4f}")
        times = list(costs(Path(folder), rounds=4 if options.quick else 40))
    if options.jsonl:
        keep(options.jsonl, [*rows, *times])
    show(reports(rows, times), markdown=options.markdown)


if __name__ == "__main__":
    main()
