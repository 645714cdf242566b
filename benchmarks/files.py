"""What reading sharded files by position costs, against pyarrow's own loader and Hugging Face's with as many workers.

Rows are windows of 512 bytes of Python's standard library in Parquet files. pyarrow's loader is its data set of the
files, cut by files among torch's loader processes; it reads in the order of the files, and shuffles nothing. `datasets`
(measured if it is installed) streams with a shuffle buffer as large as the window of `Files`. Nothing is trained.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as arrow_data
import pyarrow.parquet as pq
import torch
from loader import PREFETCH, block, drawn, endless
from paired import Report, Spread, arguments, interleave, keep, ratio, show
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from distgrow import Files
from distgrow.data.files import read_text

TARGET = 0.95
ROWS = 32_768
LENGTH, SHARDS, GROUP, WINDOW = 512, 16, 1024, 16_384


class Scanned(IterableDataset[Any]):
    """Batches by pyarrow's data set, each worker its own files."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.files, self.batch = sorted(map(str, folder.glob("*.parquet"))), batch

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        own = self.files if info is None else self.files[info.id :: info.num_workers]
        for part in arrow_data.dataset(own).to_batches(batch_size=self.batch, use_threads=False):
            if part.num_rows == self.batch:
                tokens = part.column("tokens").flatten().to_numpy().reshape(self.batch, LENGTH)
                yield {"tokens": torch.from_numpy(tokens.copy()), "id": torch.from_numpy(part["id"].to_numpy().copy())}


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Samples per second of Files over those of another loader."""

    other: str
    passes: str  #: over the files: the first one decodes them
    batch: int
    workers: int
    theirs: float  #: samples / s
    distgrow: float  #: samples / s
    over: Spread


def write(folder: Path, rows: int) -> None:
    """Write windows of text into Parquet files."""
    text = np.frombuffer(read_text(None, "*"), np.uint8)
    windows = np.resize(text, rows * LENGTH).reshape(rows, LENGTH).astype(np.int32)
    for shard, part in enumerate(np.array_split(np.arange(rows), SHARDS)):
        tokens = pa.FixedSizeListArray.from_arrays(pa.array(windows[part].reshape(-1)), LENGTH)
        table = pa.table({"id": pa.array(part), "tokens": tokens.cast(pa.list_(pa.int32()))})
        pq.write_table(table, folder / f"{shard:03}.parquet", row_group_size=GROUP)


def pairs(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield (tokens, ids) of each batch."""
    for batch in batches:
        yield batch["tokens"], batch["id"]


def streamed(folder: Path, batch: int, workers: int) -> Any | None:
    """Return batches by Hugging Face's streams, or None without them."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    files = sorted(map(str, folder.glob("*.parquet")))
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    shuffled = stream.shuffle(seed=0, buffer_size=WINDOW).with_format("torch")
    return DataLoader(shuffled, batch, num_workers=workers, prefetch_factor=PREFETCH, persistent_workers=True)


def measure(folder: Path, batch: int, workers: int, *, quick: bool) -> list[Throughput]:
    """Blocks of each loader, taking turns; a block is a whole pass."""
    rounds, count = (3, 5) if quick else (9, ROWS // batch)
    files = Files(folder, window=WINDOW, cache=folder / "cache")
    loaders = {
        "pyarrow, no shuffle": DataLoader(
            Scanned(folder, batch), None, num_workers=workers, prefetch_factor=PREFETCH, persistent_workers=True
        ),
        "datasets, shuffle buffer": streamed(folder, batch, workers),
    }
    blocks = {"distgrow": block(pairs(drawn(files, batch, workers)), count, batch)}
    blocks |= {
        name: block(pairs(endless(loader)), count, batch) for name, loader in loaders.items() if loader is not None
    }
    seconds = interleave(blocks, rounds)
    parts = {"first": slice(0, 1), "later": slice(1, None)}
    return [
        _throughput(name, passes, seconds[name][part], seconds["distgrow"][part], batch, count, workers)
        for name in islice(blocks, 1, None)
        for passes, part in parts.items()
    ]


def _throughput(
    other: str, passes: str, theirs: list[float], ours: list[float], batch: int, count: int, workers: int
) -> Throughput:
    theirs, ours = (values * 2 if len(values) == 1 else values for values in (theirs, ours))  # quartiles need two
    rate = [count * batch / sorted(values)[len(values) // 2] for values in (theirs, ours)]
    return Throughput(
        other=other, passes=passes, batch=batch, workers=workers, theirs=rate[0], distgrow=rate[1],
        over=ratio(theirs, ours),
    )  # fmt: skip


def report(rows: list[Throughput]) -> Report:
    """Return the table."""
    return Report(
        title="Samples per second, Files over another loader of the same Parquet files: median of paired ratios "
        "(quartiles)",
        columns=["against", "pass", "batch", "workers", "theirs", "Files", "÷ theirs", "target"],
        rows=[
            [
                row.other,
                row.passes,
                str(row.batch),
                str(row.workers),
                f"{row.theirs:,.0f}",
                f"{row.distgrow:,.0f}",
                str(row.over),
                f"≥ {TARGET} {'met' if row.over.median >= TARGET else 'missed'}",
            ]
            for row in rows
        ],
    )


def main() -> None:
    """Measure, keep, show."""
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="loader processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), 4096 if options.quick else ROWS)
        rows = [
            row for batch in (16, 256) for row in measure(Path(folder), batch, options.workers, quick=options.quick)
        ]
    if options.jsonl:
        keep(options.jsonl, rows)
    show([report(rows)], markdown=options.markdown)


if __name__ == "__main__":
    main()
