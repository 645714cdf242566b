"""What drawing samples through distgrow's loader costs, against torch's DataLoader with as many worker processes.

`python benchmarks/loader.py --path data/cifar10` reads CIFAR-10 from Parquet. Nothing is trained.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import Block, Report, Spread, arguments, interleave, keep, ratio, show
from torch.utils.data import DataLoader

from distgrow import budget, constant
from distgrow.core.errors import ConfigError
from distgrow.core.order import seeds
from distgrow.core.progress import Progress
from distgrow.data import datasets, files
from distgrow.data.loader import PrefetchingLoader
from distgrow.data.stream import SampleStream
from distgrow.growth.controller import Controller

PREFETCH = 4
TARGET = 0.97


class Rows:
    """A data set as users write them: one row at a time, shifted and mirrored by torch's random numbers."""

    def __init__(self, images: datasets.Images) -> None:
        self.pixels, self.labels = torch.from_numpy(images.pixels), images.labels
        self.mean, self.std = torch.tensor(images.mean).view(3, 1, 1), torch.tensor(images.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        down, right = torch.randint(9, (2,)).tolist()
        image = self.pixels[index, :, down : down + 32, right : right + 32]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return (image / 255 - self.mean) / self.std, int(self.labels[index])


class Together:
    """The built-in data set as a bare DataLoader can have it: whole batches, by `__getitems__`."""

    def __init__(self, images: datasets.Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Any:
        """Return one collated batch."""
        return self.images.batch(np.asarray(indices), seeds(int(torch.randint(2**62, ())), indices))


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Samples per second of distgrow's loader over those of the bare one."""

    dataset: str
    batch: int
    workers: int
    bare: float  #: samples / s
    distgrow: float  #: samples / s
    over_bare: Spread


def endless(loader: Any) -> Iterator[Any]:
    """Yield batches, epoch after epoch."""
    while True:
        yield from loader


def drawn(dataset: Any, batch: int, workers: int) -> Iterator[Any]:
    """Yield batches from distgrow's loader, as the training loop draws them."""
    control = Controller(growth=constant(batch), budget=budget(samples=10**12), epoch=len(dataset), max_micro=batch)
    loader = PrefetchingLoader(SampleStream(dataset), 0, control, workers=workers, prefetch=PREFETCH, pin=False)
    progress = Progress()
    while True:
        plan = control.plan(progress)
        yield from loader.draw(progress, plan)
        progress = progress.repeat(batch, 1)


def block(batches: Iterator[Any], count: int, rows: int) -> Block:
    """Draw `count` batches; each is looked at, as a forward pass would."""

    def run() -> float:
        began = time.perf_counter()
        for inputs, _ in islice(batches, count):
            assert inputs.shape[0] == rows
        return time.perf_counter() - began

    return run


def measure(name: str, dataset: Any, bare: Any, batch: int, workers: int, *, quick: bool) -> Throughput:
    """Blocks of both loaders, taking turns; the last, smaller batch of an epoch is dropped by the bare one."""
    rounds, count = (2, 5) if quick else (40, 8192 // batch)
    together = hasattr(bare, "__getitems__")
    plain = DataLoader(
        bare, batch, shuffle=True, num_workers=workers, prefetch_factor=PREFETCH, persistent_workers=True,
        drop_last=True, collate_fn=as_is if together else None,
    )  # fmt: skip
    blocks = {
        "distgrow": block(drawn(dataset, batch, workers), count, batch),
        "bare": block(endless(plain), count, batch),
    }
    seconds = interleave(blocks, rounds)
    rate = {name: sorted(count * batch / s for s in values)[len(values) // 2] for name, values in seconds.items()}
    over = ratio(seconds["bare"], seconds["distgrow"])  # of speeds, not of times
    return Throughput(
        dataset=name, batch=batch, workers=workers, bare=rate["bare"], distgrow=rate["distgrow"], over_bare=over
    )


def as_is(batch: Any) -> Any:
    """Return the batch, which is collated already."""
    return batch


def report(rows: list[Throughput]) -> Report:
    """Return the table."""
    return Report(
        title="Samples per second, distgrow's loader over a bare DataLoader: median of paired ratios (quartiles)",
        columns=["data set", "batch", "workers", "bare", "distgrow", "÷ bare", "target"],
        rows=[
            [
                row.dataset,
                str(row.batch),
                str(row.workers),
                f"{row.bare:,.0f}",
                f"{row.distgrow:,.0f}",
                str(row.over_bare),
                f"≥ {TARGET} {'met' if row.over_bare.median >= TARGET else 'missed'}",
            ]
            for row in rows
        ],
    )


def main() -> None:
    """Measure, keep, show."""
    parser = arguments(__doc__)
    parser.add_argument("--path", type=Path, default=Path("data/cifar10"), help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="loader processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        parts = files.parquet_files(options.path, "train")
    except ConfigError as error:
        parser.error(str(error))
    images = datasets.Images(*files.parquet_images(parts, limit=1000 if options.quick else None), augment=True)
    contestants = [
        ("built in, bare: rows", images, images),
        ("built in, bare: batches", images, Together(images)),
        ("a user's, both: rows", Rows(images), Rows(images)),
    ]
    rows = [
        measure(name, dataset, bare, batch, options.workers, quick=options.quick)
        for name, dataset, bare in contestants
        for batch in (16, 256)
    ]
    if options.jsonl:
        keep(options.jsonl, rows)
    show([report(rows)], markdown=options.markdown)


if __name__ == "__main__":
    main()
