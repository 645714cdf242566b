"""How distgrow scales: throughput on 1, 2 and 4 processes, the cost of deciding, and the bytes that ranks send.

    python benchmarks/scale.py [--plots FOLDER]

Every rank has one thread, and 4 ranks share the cores that there are. Throughput is that of real runs in process
groups that are up all at once and take turns. Deciding is timed alone (scale_planning.py), and as part of the updates
of one rank of up to 10⁵ of which no other exists (scale_ranks.py). Bytes are the payload that the kernel has sent over
each rank's TCP connections.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from loops import Model, build
from paired import Block, Report, Spread, arguments, interleave, keep, ratio, show, spread
from scale_planning import AXES, Cost, measure, setting_up
from scale_plots import planning, traffic
from scale_ranks import MICRO

WORLDS = (1, 2, 4)
SHARE = 64  #: rows of a rank where each rank's share stays the same
GLOBAL = 128  #: samples of a batch that stays the same
UPDATES: dict[Model, int] = {"cnn": 4, "mlp": 50}  #: of a block
BATCHES = (64, 256, 1024)  #: whose bytes are counted
SIMULATED = AXES["world"][1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Samples per second on several processes over those on one."""

    model: Model
    kind: str  #: weak: the same share for each rank; strong: the same batch
    world: int
    batch: int
    samples_per_s: float
    over_one: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that one rank sends for an update."""

    model: Model
    world: int
    batch: int
    accum: int
    parameters: int
    sent: float  #: mean over ranks
    least: float
    most: float

    @property
    def theory(self) -> float:
        """Return the bytes that a ring all-reduce of the gradients in float32 takes."""
        return 2 * (self.world - 1) / self.world * self.parameters * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """Hold microseconds of an update with simulated other ranks, and their ratio to the smallest world's."""

    world: int
    update_us: float
    over_smallest: Spread


class Group:
    """Ask a running group of ranks for measurements; see scale_ranks.py."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def __call__(self, model: Model, batch: int, updates: int) -> tuple[float, list[int]]:
        """Return the seconds of a block of updates, and the bytes that each rank sent during it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"model": model, "batch": batch, "updates": updates}) + "\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"ranks ended with exit code {self.process.wait()} before they had answered")
        answer = json.loads(line)
        return answer["seconds"], answer["sent"]


@contextmanager
def ranks(world: int, *, simulate: bool = False) -> Iterator[Group]:
    """Start a group of ranks (or the first rank of a simulated group) and stop it when the context ends."""
    script = str(Path(__file__).with_name("scale_ranks.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [script, "--simulate", str(world)] if simulate else [*launcher, script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:  # which closes its stdin and waits
        try:
            yield Group(process)
        except BaseException:
            process.terminate()
            raise


@contextmanager
def together(worlds: Sequence[int], *, simulate: bool = False) -> Iterator[dict[int, Group]]:
    """Start a group of each size at once. A group waits until it is asked."""
    with ExitStack() as stack:
        yield {world: stack.enter_context(ranks(world, simulate=simulate)) for world in worlds}


# ── the questions ───────────────────────────────────────────────────────────────────────────────────────────────


def throughputs(groups: Mapping[int, Group], rounds: int) -> Iterator[Throughput]:
    """Measure weak and strong scaling. The groups' blocks take turns."""
    for model, updates in UPDATES.items():
        batches = {"weak": {world: SHARE * world for world in groups}, "strong": dict.fromkeys(groups, GLOBAL)}
        asked = [(kind, world, batch) for kind, each in batches.items() for world, batch in each.items()]
        blocks = {f"{kind} {world}": block(groups[world], model, batch, updates) for kind, world, batch in asked}
        seconds = interleave(blocks, rounds)
        per_sample = {f"{kind} {w}": [s / batch for s in seconds[f"{kind} {w}"]] for kind, w, batch in asked}
        for kind, world, batch in asked:
            yield Throughput(
                model=model,
                kind=kind,
                world=world,
                batch=batch,
                samples_per_s=updates / spread(per_sample[f"{kind} {world}"]).median,
                over_one=ratio(per_sample[f"{kind} 1"], per_sample[f"{kind} {world}"]),
            )


def block(group: Group, model: Model, batch: int, updates: int) -> Block:
    """Return a block of updates on a group."""
    return lambda: group(model, batch, updates)[0]


def traffics(groups: Mapping[int, Group], updates: int) -> Iterator[Traffic]:
    """Measure bytes of real runs, by batch. The first block of each fills buffers and is dropped."""
    for world, model, batch in product(WORLDS[1:], UPDATES, BATCHES):
        groups[world](model, batch, updates)
        sent = [each / updates for each in groups[world](model, batch, updates)[1]]
        yield Traffic(
            model=model,
            world=world,
            batch=batch,
            accum=-(-batch // (world * MICRO)),
            parameters=sum(p.numel() for p in build(model).model.parameters()),
            sent=sum(sent) / world,
            least=min(sent),
            most=max(sent),
        )


def simulations(worlds: Sequence[int], rounds: int) -> list[Simulated]:
    """Updates of the MLP, 16 rows a rank, on the first rank of worlds of any size."""
    updates = UPDATES["mlp"]
    with together(worlds, simulate=True) as groups:
        blocks = {f"{world}": block(group, "mlp", 16 * world, updates) for world, group in groups.items()}
        seconds = interleave(blocks, rounds)
    return [
        Simulated(
            world=world,
            update_us=spread(seconds[f"{world}"]).median / updates * 1e6,
            over_smallest=ratio(seconds[f"{world}"], seconds[f"{worlds[0]}"]),
        )
        for world in worlds
    ]


# ── showing ─────────────────────────────────────────────────────────────────────────────────────────────────────


def throughput_cells(row: Throughput) -> list[str]:
    """Return a row of the first table."""
    cores = min(row.world, os.cpu_count() or 1)
    shape = [row.model.upper(), row.kind, f"{row.world} on {cores} {'cores' if cores > 1 else 'core'}"]
    efficiency = [f"{row.over_one.median / row.world:.2f}", f"{row.over_one.median / cores:.2f}"]
    return [*shape, f"{row.batch}", f"{row.samples_per_s:,.0f}", str(row.over_one), *efficiency]


def traffic_cells(row: Traffic) -> list[str]:
    """Return a row of the second table."""
    shape = [row.model.upper(), f"{row.parameters:,}", f"{row.world}", f"{row.batch:,}", f"{row.accum}"]
    sent = [f"{row.sent:,.0f} ({row.least:,.0f} … {row.most:,.0f})", f"{row.theory:,.0f}"]
    return [*shape, *sent, f"{row.sent / row.theory:.3f}", f"{row.sent / row.batch:,.1f}"]


def planning_cells(row: Cost) -> list[str]:
    """Return a row of the third table."""
    first, last = row.us[0], row.us[-1]
    ends = f"{row.points[0]:,} → {row.points[-1]:,}"
    memory = f"{max(row.peak_bytes) / 1e3:.1f} kB" if row.peak_bytes else ""
    return [row.axis, ends, row.growth, row.part, f"{first.median:.1f}", f"{last.median:.1f}", str(row.over), memory]


def reports(
    speeds: Sequence[Throughput],
    bytes_sent: Sequence[Traffic],
    costs: Sequence[Cost],
    worlds: Sequence[Simulated],
    once: dict[int, Spread],
) -> list[Report]:
    """Return the tables."""
    cores = os.cpu_count() or 1
    return [
        Report(
            title=f"Samples per second of real runs, ranks of one thread on {cores} cores: medians (quartiles)",
            columns=["model", "scaling", "ranks", "batch", "samples/s", "÷ one rank", "÷ ranks", "÷ cores in use"],
            rows=[throughput_cells(row) for row in speeds],
        ),
        Report(
            title="Bytes that a rank sends for an update (smallest … largest of the ranks)",
            columns=["model", "parameters", "W", "batch", "accum", "sent", "2(W − 1)/W·P·4", "ratio", "per sample"],
            rows=[traffic_cells(row) for row in bytes_sent],
        ),
        Report(
            title="Microseconds of deciding an update, and its peak memory: from the least to the most of each axis",
            columns=["axis", "from → to", "growth", "part", "µs at the least", "at the most", "ratio", "memory"],
            rows=[planning_cells(row) for row in costs],
        ),
        Report(
            title="An update of the MLP, 16 rows a rank, on one rank of many of which no other exists",
            columns=["ranks", "µs", f"÷ that of {SIMULATED[0]} ranks"],
            rows=[[f"{row.world:,}", f"{row.update_us:,.0f}", str(row.over_smallest)] for row in worlds],
        ),
        Report(
            title="Milliseconds of setting up and checking a list of stages, once a run, by its stages",
            columns=[f"{stages:,}" for stages in once],
            rows=[[str(value) for value in once.values()]],
        ),
    ]


def draw(folder: Path, bytes_sent: Sequence[Traffic], costs: Sequence[Cost], worlds: Sequence[Simulated]) -> None:
    """Write the plots into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    planning(costs, {row.world: row.update_us for row in worlds}).savefig(folder / "scale-planning.png")
    rows = [row for row in bytes_sent if row.model == "cnn"]
    found = {world: [(row.batch, row.sent / row.batch) for row in rows if row.world == world] for world in WORLDS[1:]}
    traffic(found, {row.world: row.theory for row in rows}).savefig(folder / "scale-bytes.png")


def main() -> None:
    """Measure, keep, show, draw."""
    parser = arguments(__doc__)
    parser.add_argument("--plots", type=Path, help="put plots into this folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, worlds = (2, SIMULATED[:: len(SIMULATED) - 1]) if options.quick else (40, SIMULATED)
    with together(WORLDS) as groups:
        speeds = list(throughputs(groups, rounds))
        bytes_sent = list(traffics(groups, 2 if options.quick else 20))
    costs, once = measure(rounds), setting_up(rounds if options.quick else 5)
    simulated = simulations(worlds, rounds)
    if options.jsonl:
        rows: list[Any] = [*speeds, *bytes_sent, *costs, *simulated]
        keep(options.jsonl, rows)
    show(reports(speeds, bytes_sent, costs, simulated, once), markdown=options.markdown)
    if options.plots:
        draw(options.plots, bytes_sent, costs, simulated)


if __name__ == "__main__":
    main()
