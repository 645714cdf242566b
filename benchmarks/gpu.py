"""What distgrow gives and costs on one GPU: overhead, tokens per second and MFU, growth, and checkpoints.

    python benchmarks/gpu.py [--device cuda|cpu] [--quick] [--markdown] [--jsonl FILE]

Overhead: blocks of updates of distgrow's own loop and of hand-written ones take turns, as in overhead.py: a small CNN,
a ResNet-18 on images of CIFAR's shape, and a GPT of 30 million parameters in bfloat16, compiled and not. The paper's
row: ResNet-18 by its schedule, in fewer epochs, beside its first batch throughout, on as many gradient evaluations. It
takes under ten minutes; --quick runs all of it on small models.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loops import Model, build
from overhead import Case, measure_overhead, measure_transition
from overhead_tables import Overhead, Transition, overhead_cells, transition_cells
from paired import Report, arguments, keep, show, tell
from recovery import Stall, stall_cells, summary
from torch import Tensor, nn

from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.budget import Budget
from distgrow.core.lr import LR, Factor
from distgrow.core.peak_flops import peak_flops
from distgrow.core.stages import Every, Stages
from distgrow.distributed.world import World, joined
from distgrow.engine.spec import Torch
from distgrow.growth import Growth
from distgrow.growth.constant import Constant
from distgrow.growth.exponential import Exponential
from distgrow.tasks.task import Task
from distgrow.training.fit import fit
from distgrow.training.hooks import EndRun, Hook, UpdateMade
from distgrow.training.spec import RunSpec

SECONDS = 0.25  #: of a block, about
OVERHEAD = "Time per update, distgrow over a hand-written loop: median of paired ratios (quartiles)"
PAPER = "The paper's schedule (ResNet-18, b doubles from 4 to 512, η × 1.4) in short, and its first batch throughout"
STALL = "Seconds that training waited for checkpoints, GPT of 30 million parameters with AdamW"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast the GPT trains under distgrow."""

    engine: str
    parameters: int
    tokens_per_s: float
    mfu: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A whole run."""

    schedule: str
    updates: int
    evaluations: int
    seconds: float
    loss: float
    accuracy: float


# ── the questions ───────────────────────────────────────────────────────────────────────────────────────────────


def cases(device: Any, *, quick: bool) -> Iterator[tuple[Case, str | None]]:
    """Return the rows of the first table, each with the optimizer of torch that both sides have; None: SGD."""
    images, texts = (8, 4) if quick else (128, 32)
    for model in ("cnn", "resnet18"):
        for spec in (Torch(device=device, max_micro=images), Torch(device=device, max_micro=images, ahead=1)):
            yield case(model, spec, quick=quick), None
    for compiled in (False, True):
        engine = Torch(device=device, max_micro=texts, precision="bfloat16", compile=compiled)
        yield case("gpt", engine, quick=quick), "AdamW"


def case(model: Model, engine: Torch, *, quick: bool) -> Case:
    """Return a row with blocks of about SECONDS on a recent GPU."""
    updates = 2 if quick else {"cnn": 100, "mlp": 100, "resnet18": 20, "gpt": 5}[model]
    return Case(model=model, engine=engine, accum=1, updates=updates, limit=1.02, small=quick)


def speed(row: Overhead, task: Task, world: World) -> Speed:
    """Return tokens per second and MFU of a measured row of the GPT."""
    assert isinstance(task.tokens, int)
    assert task.flops_per_token is not None
    tokens_per_s = row.micro * row.accum * task.tokens / (row.distgrow_us / 1e6)
    peak = peak_flops(torch.cuda.get_device_name(), "bfloat16") if world.device.type == "cuda" else None
    return Speed(
        engine=row.engine,
        parameters=sum(parameter.numel() for parameter in task.model.parameters()),
        tokens_per_s=tokens_per_s,
        mfu=None if peak is None else tokens_per_s * task.flops_per_token / peak,
    )


def accuracy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Loss and accuracy of a batch of images."""
    logits = model(batch[0])
    right = (logits.argmax(-1) == batch[1]).float().mean()
    return {"loss": nn.functional.cross_entropy(logits, batch[1]), "accuracy": right}


def paper(world: World, folder: Path, *, quick: bool) -> list[Row]:
    """Train ResNet-18 by the paper's schedule, and at its first batch, on as many gradient evaluations."""
    first, last, epochs = (16, 64, 1) if quick else (4, 512, 1)
    growing = Exponential(start=first, factor=2, cap=last)
    schedules: dict[str, Growth] = {f"{first} → {last}": growing, f"{first} throughout": Constant(start=first)}
    stages = 1 + (last // first).bit_length() - 1
    rows: list[Row] = []
    for name, growth in schedules.items():
        tell(f"ResNet-18, batch {name}")
        task, began = build("resnet18", small=quick), time.perf_counter()
        result = fit(
            task.model, task.loss, task.train, test=task.test, metrics=accuracy, growth=growth,
            budget=Budget(epochs=stages * epochs), stages=Stages(every=Every(epochs=epochs)),
            lr=LR(base=0.1, rule=Factor(factor=1.4)), engine=Torch(max_micro=last),
            run=RunSpec(dir=str(folder / name.replace(" ", "-")), checkpoint=Checkpointing(every_s=1e9)), world=world,
        )  # fmt: skip
        progress, seconds = result.progress, time.perf_counter() - began
        spent = {"updates": progress.step, "evaluations": progress.ledger.total, "seconds": seconds}
        rows.append(Row(schedule=name, loss=result.metrics["loss"], accuracy=result.metrics["accuracy"], **spent))
    return rows


class Until(Hook):
    """End a run after some seconds."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def after_update(self, update: UpdateMade) -> EndRun | None:
        """See Hook."""
        return EndRun("time") if time.monotonic() > self._end else None


def stall(world: World, folder: Path, seconds: float, every_s: float, *, quick: bool) -> Stall:
    """Train the GPT for some seconds, with a checkpoint each `every_s`."""
    task = build("gpt", small=quick)
    result = fit(
        task.model, task.loss, task.train, growth=Constant(start=4 if quick else 32), budget=Budget(epochs=10**6),
        optimizer=torch.optim.AdamW, engine=Torch(max_micro=64, precision="bfloat16"), hooks=[Until(seconds)],
        run=RunSpec(dir=str(folder / "stall"), checkpoint=Checkpointing(every_s=every_s)), world=world,
    )  # fmt: skip
    lines = [json.loads(line) for line in (result.dir / "metrics.jsonl").read_text().splitlines()]
    newest = max((result.dir / "checkpoints").glob("step-*"))
    return summary(lines, sum(file.stat().st_size for file in newest.iterdir()))


# ── running and showing ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All rows."""

    overheads: Sequence[Overhead]
    speeds: Sequence[Speed]
    transition: Transition
    paper: Sequence[Row]
    stall: Stall
    every_s: float

    def rows(self) -> list[Any]:
        """Return them in one list."""
        return [*self.overheads, *self.speeds, self.transition, *self.paper, self.stall]


def measure(device: Any, *, quick: bool, compiled: bool = True) -> Measured:
    """Measure everything; without `compiled` leave out what torch.compile has made."""
    torch.set_num_threads(1 if device == "cpu" else 8)
    overheads, speeds = list[Overhead](), list[Speed]()
    with joined(device) as world, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each, optimizer in cases(device, quick=quick):
            if isinstance(each.engine, Torch) and each.engine.compile and not compiled:
                continue
            tell(f"overhead: {each.model}")
            overheads.append(measure_overhead(each, world, 2 if quick else 30, folder / "job", optimizer))
            if each.model == "gpt":
                speeds.append(speed(overheads[-1], build("gpt", small=quick), world))
        tell("growth")
        transition = measure_transition("cnn", world, 1 if quick else 10, folder / "growing")
        rows = paper(world, folder, quick=quick)
        tell("checkpoints")
        seconds, every_s = (2.0, 0.5) if quick else (30.0, 5.0)
        stalled = stall(world, folder, seconds, every_s, quick=quick)
    return Measured(
        overheads=overheads, speeds=speeds, transition=transition, paper=rows, stall=stalled, every_s=every_s
    )


def reports(found: Measured) -> list[Report]:
    """Return the tables."""
    shape, over = "world × micro × accum", ["÷ bare", "target", "÷ logging"]
    return [
        Report(
            title=OVERHEAD,
            columns=["model", "engine", shape, "bare µs", "distgrow µs", *over],
            rows=[overhead_cells(row) for row in found.overheads],
        ),
        Report(
            title="Tokens per second and MFU of the GPT",
            columns=["engine", "parameters", "tokens/s", "MFU"],
            rows=[
                [row.engine, f"{row.parameters:,}", f"{row.tokens_per_s:,.0f}", _share(row.mfu)] for row in found.speeds
            ],
        ),
        Report(
            title="First update of a new stage beyond the stage's median update, in updates: median (quartiles)",
            columns=["model", "processes", "batches", "distgrow", "bare loop, same batches", "target"],
            rows=[transition_cells(found.transition)],
        ),
        Report(
            title=PAPER,
            columns=["batch", "updates", "gradient evaluations", "s", "test loss", "test accuracy"],
            rows=[
                [
                    *(row.schedule, f"{row.updates:,}", f"{row.evaluations:,}"),
                    *(f"{row.seconds:.1f}", f"{row.loss:.4f}", f"{row.accuracy:.1%}"),
                ]
                for row in found.paper
            ],
        ),
        Report(
            title=STALL,
            columns=["interval s", "MB", "written", "run s", "waited s", "of the run", "each s", "updates", "target"],
            rows=[stall_cells(found.every_s, found.stall)],
        ),
    ]


def _share(mfu: float | None) -> str:
    return "–" if mfu is None else f"{mfu:.1%}"


def main() -> None:
    """Measure, keep, show."""
    parser = arguments(__doc__, "small models, minutes, with numbers that mean nothing")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="what computes; default: cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; try it out by --device cpu --quick")
    found = measure(options.device, quick=options.quick)
    if options.jsonl:
        keep(options.jsonl, found.rows())
    show(reports(found), markdown=options.markdown)


if __name__ == "__main__":
    main()
