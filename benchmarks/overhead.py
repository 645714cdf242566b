"""What distgrow's loop costs per update, against a hand-written loop on the same model, data and split.

`python benchmarks/overhead.py` measures plain torch in one process here and in two under torchrun;
`--engine deepspeed` measures ZeRO 1 and 2 against loops around DeepSpeed's engine. Every rank uses one thread.
`--optimizer Adadelta` measures one process with that optimizer of torch, given as a user's own, on both sides.
`--against REVISION` compares the updates of this checkout with those of another one, without a bare loop.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from against import against
from loops import Bare, Model, bare_loop, build, build_job
from overhead_tables import Overhead, Transition, reports
from paired import Block, arguments, in_two_processes, interleave, keep, ratio, show, spread

from distgrow.core.budget import Budget
from distgrow.core.progress import Progress
from distgrow.core.stages import Every, Stages
from distgrow.distributed.environment import launched, place
from distgrow.distributed.world import World, joined
from distgrow.engine.spec import DeepSpeed, EngineSpec, Torch
from distgrow.growth.constant import Constant
from distgrow.growth.exponential import Exponential
from distgrow.launch.local import leave
from distgrow.training.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the overhead table before it is measured."""

    model: Model
    engine: EngineSpec
    accum: int
    updates: int  #: of a block
    small: bool = False  #: of a smoke run
    limit: float  #: largest ratio to the bare loop that is good enough


CASES = {
    "torch": [
        Case(model="cnn", engine=Torch(device="cpu", max_micro=16), accum=1, updates=8, limit=1.02),
        Case(model="cnn", engine=Torch(device="cpu", max_micro=16), accum=4, updates=2, limit=1.02),
        Case(model="mlp", engine=Torch(device="cpu", max_micro=4), accum=1, updates=100, limit=1.10),
        Case(model="mlp", engine=Torch(device="cpu", max_micro=4), accum=4, updates=40, limit=1.10),
    ],
    "deepspeed": [
        Case(model="cnn", engine=DeepSpeed(zero=1, max_micro=16), accum=1, updates=8, limit=1.03),
        Case(model="cnn", engine=DeepSpeed(zero=1, max_micro=16), accum=4, updates=2, limit=1.03),
        Case(model="cnn", engine=DeepSpeed(zero=2, max_micro=16), accum=1, updates=8, limit=1.03),
        Case(model="cnn", engine=DeepSpeed(zero=2, max_micro=16), accum=4, updates=2, limit=1.03),
    ],
}


# ── the questions ───────────────────────────────────────────────────────────────────────────────────────────────


def block(work: Callable[[], object], world: World) -> Block:
    """Return a block that begins on all ranks at once."""

    def run() -> float:
        world.sum([0.0])
        settle(world)
        began = time.perf_counter()
        work()
        settle(world)
        return time.perf_counter() - began

    return run


def settle(world: World) -> None:
    """Wait until the device has done what it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def distgrow_block(job: Trainer, updates: int, world: World) -> Block:
    """Return a block of updates of a real run. Each block begins where the one before it ended."""
    progress = Progress()

    def go_on() -> None:
        nonlocal progress
        progress = job.train(progress).progress

    inner = block(go_on, world)

    def run() -> float:
        job.controller = replace(job.controller, budget=Budget(steps=progress.step + updates))
        return inner()

    return run


def measure_overhead(case: Case, world: World, rounds: int, folder: Path, optimizer: str | None = None) -> Overhead:
    """Blocks of distgrow, the bare loop and the bare loop with logging, taking turns."""
    micro = case.engine.max_micro
    assert isinstance(micro, int)
    growth = Constant(start=micro * case.accum * world.size)
    own, *others = (build(case.model, small=case.small) for _ in range(3))
    job = build_job(own, world, growth, engine=case.engine, folder=folder, optimizer=optimizer)
    bare, logging = (
        bare_loop(task, world, case.engine, case.accum, optimizer=optimizer, logging=logging)
        for task, logging in zip(others, (False, True), strict=True)
    )
    blocks = {
        "distgrow": distgrow_block(job, case.updates, world),
        "bare": block(lambda: bare.updates(case.updates, micro, case.accum), world),
        "logging": block(lambda: logging.updates(case.updates, micro, case.accum), world),
    }
    seconds = interleave(blocks, rounds)
    job.events.tracker.close()
    return Overhead(
        model=case.model,
        engine=label(case.engine),
        world=world.size,
        micro=micro,
        accum=case.accum,
        bare_us=statistics.median(seconds["bare"]) / case.updates * 1e6,
        distgrow_us=statistics.median(seconds["distgrow"]) / case.updates * 1e6,
        over_bare=ratio(seconds["distgrow"], seconds["bare"]),
        over_logging=ratio(seconds["distgrow"], seconds["logging"]),
        limit=case.limit,
    )


def label(engine: EngineSpec) -> str:
    """Return an engine in a word or two."""
    if isinstance(engine, DeepSpeed):
        return f"ZeRO {engine.zero}"
    precision = "" if engine.precision == "float32" else engine.precision
    words = [engine.kind, precision, "compiled" * getattr(engine, "compile", False), "ahead" * engine.ahead]
    return ", ".join(filter(None, words))


def measure_transition(model: Model, world: World, runs: int, folder: Path) -> Transition:
    """Whole runs of a growing run and of a bare loop whose batch changes at the same updates, taking turns."""
    start, count, updates = 16 * world.size, 4, 24
    growth = Exponential(start=start, factor=2, cap=start * 2 ** (count - 1))
    stages = Stages(every=Every(steps=updates))
    job = build_job(build(model), world, growth, engine=Torch(max_micro=64), folder=folder, stages=stages)
    job.controller = replace(job.controller, budget=Budget(steps=count * updates))
    bare = Bare(build(model), world)
    extra: dict[str, list[float]] = {"distgrow": [], "bare": []}
    for _ in range(runs):
        job.moments.clear()
        job.train(Progress())
        extra["distgrow"] += extra_of_first([*job.moments], updates)
        moments: list[float] = []
        for stage in range(count):
            share = 16 * 2**stage
            for _ in range(updates):
                bare.updates(1, min(64, share), max(1, share // 64))
                settle(world)
                moments.append(time.perf_counter())
        extra["bare"] += extra_of_first(moments, updates)
    job.events.tracker.close()
    return Transition(
        model=model,
        world=world.size,
        batches=[growth.stage_batch(stage) for stage in range(count)],
        distgrow=spread(extra["distgrow"]),
        bare=spread(extra["bare"]),
    )


def extra_of_first(moments: list[float], updates: int) -> list[float]:
    """For every stage but the first: (first update − median update) / median update; stages of `updates` updates."""
    seconds = [after - before for before, after in zip(moments, moments[1:], strict=False)]
    firsts = range(updates - 1, len(seconds), updates)
    return [seconds[i] / statistics.median(seconds[i + 1 : i + updates]) - 1 for i in firsts]


# ── running and showing ─────────────────────────────────────────────────────────────────────────────────────────


def measure_own(optimizer: str, *, quick: bool) -> Iterator[Overhead]:
    """Every row of plain torch in one process, with a user's own optimizer."""
    torch.set_num_threads(1)
    with joined("cpu") as world, tempfile.TemporaryDirectory() as folder:
        for case in CASES["torch"]:
            yield measure_overhead(case, world, 4 if quick else 100, Path(folder), optimizer)


def measure(engine: str, *, quick: bool) -> Iterator[Overhead | Transition]:
    """Every row, in the world that the environment describes. Collective: every rank must call."""
    torch.set_num_threads(1)
    rounds, runs = (4, 2) if quick else (100, 20)
    with joined("cpu", alone=True) as world, tempfile.TemporaryDirectory() as folder:
        for case in CASES[engine]:
            yield measure_overhead(case, world, rounds, Path(folder))
        for model in ("cnn", "mlp") if engine == "torch" else ():
            yield measure_transition(model, world, runs, Path(folder))


def measure_two(engine: str, *, quick: bool) -> list[Overhead | Transition]:
    """Measure the same in two processes."""
    kinds = {"Overhead": Overhead, "Transition": Transition}
    rows = in_two_processes(__file__, "--engine", engine, *(["--quick"] if quick else []))
    return [kinds[row.pop("benchmark")](**row) for row in rows]


def main() -> None:
    """Measure, keep, show."""
    parser = arguments(__doc__)
    parser.add_argument("--engine", choices=list(CASES), default="torch", help="what computes")
    parser.add_argument("--against", metavar="REVISION", help="only compare with this revision or checkout")
    parser.add_argument("--optimizer", metavar="NAME", help="only measure this optimizer of torch.optim")
    options = parser.parse_args()
    if options.optimizer:
        own = list(measure_own(options.optimizer, quick=options.quick))
        if options.jsonl:
            keep(options.jsonl, own)
        show(reports([*own]), markdown=options.markdown)
        return
    if options.against:
        names = [f"{case.model.upper()} × {case.accum}" for case in CASES["torch"]]
        show([against(options.against, names, 4 if options.quick else 100)], markdown=options.markdown)
        return
    rows = list(measure(options.engine, quick=options.quick))
    if launched():
        if place()[0] == 0:
            keep(options.jsonl, rows)
        leave()
    rows += measure_two(options.engine, quick=options.quick)
    if options.jsonl:
        keep(options.jsonl, rows)
    show(reports(rows), markdown=options.markdown)


if __name__ == "__main__":
    main()
