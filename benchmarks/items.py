"""What it costs to weigh micro-batches by their items: time of an update with `items` over one without, paired."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from loops import build, build_job
from overhead import distgrow_block
from paired import Report, Spread, arguments, interleave, keep, ratio, show
from torch import Tensor

from distgrow.distributed.world import joined
from distgrow.engine.spec import Torch
from distgrow.growth.constant import Constant

MICRO, LIMIT = 16, 1.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time of an update with items over that of one without."""

    micro: int
    accum: int
    over_plain: Spread


def rows_of(batch: tuple[Tensor, Tensor]) -> Tensor:
    """Count an item a row, so that both losses are the same mean."""
    return torch.tensor(float(len(batch[1])))


def costs(folder: Path, *, rounds: int) -> Iterator[Cost]:
    """Blocks of the CNN's updates with items and without, taking turns."""
    with joined("cpu", alone=True) as world:
        for accum, updates in ((1, 8), (4, 2)):
            counted: dict[str, Any] = {"plain": None, "items": rows_of}
            jobs = {
                name: build_job(
                    replace(build("cnn"), items=items), world, Constant(start=MICRO * accum),
                    engine=Torch(device="cpu", max_micro=MICRO), folder=folder / f"{name}-{accum}",
                )
                for name, items in counted.items()
            }  # fmt: skip
            seconds = interleave({name: distgrow_block(job, updates, world) for name, job in jobs.items()}, rounds)
            for job in jobs.values():
                job.events.tracker.close()
            yield Cost(micro=MICRO, accum=accum, over_plain=ratio(seconds["items"], seconds["plain"]))


def reports(rows: list[Cost]) -> list[Report]:
    """Return the table."""
    return [
        Report(
            title="Time of an update of the CNN with items over one without: median of paired ratios (quartiles)",
            columns=["micro × accum", "÷ without", "target"],
            rows=[
                [
                    f"{row.micro} × {row.accum}", str(row.over_plain),
                    f"≤ {LIMIT} {'met' if row.over_plain.median <= LIMIT else 'missed'}",
                ]
                for row in rows
            ],
        )
    ]  # fmt: skip


def main() -> None:
    """Measure, keep, show."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(costs(Path(folder), rounds=4 if options.quick else 200))
    if options.jsonl:
        keep(options.jsonl, rows)
    show(reports(rows), markdown=options.markdown)


if __name__ == "__main__":
    main()
