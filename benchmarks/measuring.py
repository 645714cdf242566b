"""What measuring gradient noise costs per update, against the same loop that does not measure.

`python benchmarks/measuring.py` measures one process here and two under torchrun; every rank uses one thread. All
contestants are distgrow's own loop on the CNN of overhead.py: "noise" measures as growth that follows the noise scale
does, "product" holds every gradient against the update before, as the progress test does.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from loops import build, build_job
from overhead import distgrow_block
from paired import Report, Spread, arguments, in_two_processes, interleave, keep, ratio, show

from distgrow.core.noise_stats import Measuring
from distgrow.distributed.environment import launched, place
from distgrow.distributed.world import World, joined
from distgrow.engine.spec import Torch
from distgrow.growth import Growth
from distgrow.growth.constant import Constant
from distgrow.growth.noise_scale import NoiseScale
from distgrow.growth.progress_test import ProgressTest
from distgrow.launch.local import leave

LIMIT = 1.02  #: largest ratio that is good enough, where a batch comes in one micro-batch a rank
MICRO, UPDATES = 16, 8  #: rows of a micro-batch; updates of a block with one of them a rank
NEVER = Measuring(every=2**62)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds per update with measuring over those without; gradient evaluations beyond the samples trained on."""

    world: int
    accum: int
    plain_us: float
    noise: Spread
    product: Spread
    evaluations: int


def measure_cost(accum: int, world: World, rounds: int, folder: Path) -> Cost:
    """Blocks of the three loops, taking turns; none of them ever grows."""
    batch, updates = MICRO * accum * world.size, max(2, UPDATES // accum)
    contestants: dict[str, tuple[Growth, Measuring]] = {
        "plain": (Constant(start=batch), NEVER),
        "noise": (NoiseScale(start=batch, cap=batch), Measuring()),
        "product": (ProgressTest(start=batch, cap=batch, confidence=1e9), NEVER),
    }
    jobs = {
        name: build_job(
            build("cnn"),
            world,
            growth,
            engine=Torch(device="cpu", max_micro=MICRO),
            folder=folder / name,
            measuring=measuring,
        )
        for name, (growth, measuring) in contestants.items()
    }
    seconds = interleave({name: distgrow_block(job, updates, world) for name, job in jobs.items()}, rounds)
    for job in jobs.values():
        job.events.tracker.close()
    made = {name: job.controller.budget.steps or 0 for name, job in jobs.items()}
    extra = [job.engine.evaluations - made[name] * batch // world.size for name, job in jobs.items()]
    return Cost(
        world=world.size,
        accum=accum,
        plain_us=sorted(seconds["plain"])[rounds // 2] / updates * 1e6,
        noise=ratio(seconds["noise"], seconds["plain"]),
        product=ratio(seconds["product"], seconds["plain"]),
        evaluations=max(extra),
    )


def measure(*, quick: bool) -> Iterator[Cost]:
    """Every row, in the world that the environment describes. Collective: every rank must call."""
    torch.set_num_threads(1)
    with joined("cpu", alone=True) as world, tempfile.TemporaryDirectory() as folder:
        for accum in (1, 4):
            yield measure_cost(accum, world, 4 if quick else 100, Path(folder))


def measure_two(*, quick: bool) -> list[Cost]:
    """Measure the same in two processes."""
    rows = in_two_processes(__file__, *(["--quick"] if quick else []))
    return [Cost(**{key: value for key, value in row.items() if key != "benchmark"}) for row in rows]


def report(rows: list[Cost]) -> Report:
    """Return the table."""
    return Report(
        title="Time per update with measuring over that without: median of paired ratios (quartiles)",
        columns=["world × micro × accum", "plain µs", "noise", "product", "target", "gradient evaluations"],
        rows=[cells(row) for row in rows],
    )


def cells(row: Cost) -> list[str]:
    """Return a row of the table."""
    met = ["met" if spread.median <= LIMIT else "missed" for spread in (row.noise, row.product)]
    target = f"≤ {LIMIT:.2f} {met[0]}, {met[1]}" if row.accum == 1 else ""
    shape = f"{row.world} × {MICRO} × {row.accum}"
    return [shape, f"{row.plain_us:,.0f}", str(row.noise), str(row.product), target, f"{row.evaluations}"]


def main() -> None:
    """Measure, keep, show."""
    options = arguments(__doc__).parse_args()
    rows = list(measure(quick=options.quick))
    if launched():
        if place()[0] == 0:
            keep(options.jsonl, rows)
        leave()
    rows += measure_two(quick=options.quick)
    if options.jsonl:
        keep(options.jsonl, rows)
    show([report(rows)], markdown=options.markdown)


if __name__ == "__main__":
    main()
