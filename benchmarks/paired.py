"""Paired, interleaved timing, and how its results are shown; knows nothing of what is timed.

On a shared machine absolute times wander by tens of percent, so contestants take turns in short blocks and only the
ratios of neighbouring blocks are kept: their median, with the quartiles.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Block = Callable[[], float]  #: does one block of work and gives the seconds that count


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A median with its quartiles."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} … {self.high:.3f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One table of a benchmark."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def interleave(blocks: Mapping[str, Block], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contestant's blocks; all take a turn each round, in an order that flips every round.

    One more round, the first, is a warm-up and is not kept.
    """
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    for turn in range(rounds + 1):
        for name in sorted(blocks, key=list(blocks).index, reverse=turn % 2 == 1):
            taken = blocks[name]()
            if turn:
                seconds[name].append(taken)
    return seconds


def timed(work: Callable[[], object]) -> Block:
    """A block all of whose seconds count."""

    def block() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return block


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Median and quartiles of the paired ratios above / below."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low=low, median=median, high=high)


def hardware() -> str:
    """The machine and the torch that a table was measured on."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{_cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show(reports: Sequence[Report], *, markdown: bool) -> None:
    """Print the tables, for a terminal or as Markdown."""
    if markdown:
        print(f"Hardware: {hardware()}.")
        for report in reports:
            print(f"\n**{report.title}**\n")
            for cells in (report.columns, ["---"] * len(report.columns), *report.rows):
                print(f"| {' | '.join(cells)} |")
        return
    console = Console()
    for report in reports:
        table = Table(*report.columns, title=report.title, title_justify="left", caption_justify="left")
        for row in report.rows:
            table.add_row(*row)
        console.print(table)
    console.print(hardware())


def tell(line: str) -> None:
    """Progress, for who watches."""
    print(line, file=sys.stderr, flush=True)


def arguments(about: str | None, quick: str = "seconds, with numbers that mean nothing") -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"a smoke run: {quick}")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


def in_two_processes(script: str, *options: str) -> list[dict[str, Any]]:
    """The rows that a script keeps where torchrun starts it on two ranks of one thread each; the inverse of `keep`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, script, "--jsonl", str(path), *options]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["hardware"]
        row.update({key: Spread(**value) for key, value in row.items() if isinstance(value, dict)})
    return rows


def keep(path: Path, rows: Sequence[Any]) -> None:
    """Append dataclass rows to a JSONL file, each with the hardware it was measured on."""
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"benchmark": type(row).__name__, **asdict(row), "hardware": hardware()}) + "\n")
