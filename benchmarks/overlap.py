"""What it saves to average a gradient over two ranks while the next one is computed, on links of several speeds.

    python benchmarks/overlap.py [--quick]

Two ranks of one thread each train a multilayer perceptron: by plain DistributedDataParallel, with `delay: 1`, and with
`delay: 1` and `ahead: 1`. Blocks of updates take turns, and only ratios of neighbouring blocks are kept. Slowed links
join two network namespaces and are held to their rate by the kernel's token bucket filter (tc tbf), which needs root.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from paired import Block, Report, Spread, arguments, interleave, keep, ratio, show, tell, timed
from torch import Tensor, nn

from distgrow.core.plan import Plan
from distgrow.distributed.world import World, joined
from distgrow.engine.protocol import Engine
from distgrow.engine.spec import Torch
from distgrow.launch.local import leave
from distgrow.optim.sgd import SGD

#: Rates of the link, as tc writes them; None: the host's own loopback.
RATES = (None, "1gbit", "300mbit", "100mbit")
WIDTH, BATCH = 768, 256
KINDS = {
    "plain": Torch(), "delay 1": Torch(delay=1), "delay 1, ahead 1": Torch(delay=1, ahead=1),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The times of an update over a link, as multiples of the plain one's."""

    rate: str
    plain_ms: float  #: median of the plain update
    delayed: Spread
    overlapped: Spread


def network() -> nn.Module:
    """A perceptron of 1.8 million numbers, alike on every rank."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean over the rows."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def block(engine: Engine, world: World, updates: int) -> Block:
    """A block of updates at a rate that moves nothing, so that every block does the same work."""
    rows = BATCH // world.size
    batch = (torch.randn(rows, WIDTH), torch.randint(10, (rows,)))
    plan = Plan(batch=BATCH, world=world.size, micro=rows, accum=1, lr=1e-9, stage=0)

    def work() -> None:
        for _ in range(updates):
            engine.update(plan, [batch])

    return timed(work)


def rank(updates: int, rounds: int) -> None:
    """Be one of two ranks, and print the seconds of every block if it is the first."""
    with joined("cpu") as world:
        engines = {
            kind: spec.build(network(), loss, metrics=None, optimizer=SGD(), world=world)
            for kind, spec in KINDS.items()
        }
        seconds = interleave({kind: block(engine, world, updates) for kind, engine in engines.items()}, rounds)
        if world.rank == 0:
            print("seconds: " + json.dumps(seconds), flush=True)
    leave()


@contextmanager
def hosts(rate: str | None) -> Iterator[list[tuple[list[str], dict[str, str]]]]:
    """Yield, for each rank, what its command begins with and its environment."""
    own = {"MASTER_PORT": "29871", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}
    if rate is None:
        yield [([], {**own, "MASTER_ADDR": "127.0.0.1", "RANK": str(number)}) for number in range(2)]
        return
    names = [f"distgrow-overlap-{number}" for number in range(2)]
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run(
            "ip",
            "link",
            "add",
            "cable0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable0",
            "netns",
            names[1],
        )
        for number, name in enumerate(names):
            run("ip", "-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "cable0")
            for device in ("lo", "cable0"):
                run("ip", "-n", name, "link", "set", device, "up")
            limit = ("rate", rate, "burst", "256kb", "latency", "50ms")
            run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "cable0", "root", "tbf", *limit)
        given = {**own, "MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "cable0"}
        yield [(["ip", "netns", "exec", name], {**given, "RANK": str(k)}) for k, name in enumerate(names)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def run(*command: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True, capture_output=True)


def measured(rate: str | None, updates: int, rounds: int) -> Link:
    """Time the contestants over a link."""
    options = ["--rank", "--updates", str(updates), "--rounds", str(rounds)]
    command = [sys.executable, str(Path(__file__).resolve()), *options]
    with hosts(rate) as ranks, tempfile.TemporaryFile("w+") as output:
        started = [
            subprocess.Popen([*before, *command], env={**os.environ, **given}, stdout=output, text=True)
            for before, given in ranks
        ]
        codes = [process.wait() for process in started]
        output.seek(0)
        told = output.read()
    if any(codes):
        raise SystemExit(f"the ranks ended with {codes}:\n{told}")
    seconds: Mapping[str, Sequence[float]] = json.loads(told.rpartition("seconds: ")[2])
    plain = seconds["plain"]
    return Link(
        rate=rate or "loopback",
        plain_ms=1000 * sorted(plain)[len(plain) // 2] / updates,
        delayed=ratio(seconds["delay 1"], plain),
        overlapped=ratio(seconds["delay 1, ahead 1"], plain),
    )


def main() -> None:
    """Time all links, and show the table."""
    parser = arguments(__doc__)
    parser.add_argument("--rank", action="store_true", help="be one of two ranks (for this script itself)")
    parser.add_argument("--updates", type=int, default=10, help="updates of a block")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    if given.rank:
        rank(given.updates, given.rounds)
        return
    found: list[Link] = []
    for rate in RATES[:2] if given.quick else RATES:
        if rate is not None and os.geteuid():
            tell(f"a link of {rate} needs root, and is left out")
            continue
        tell(f"link: {rate or 'loopback'}")
        found.append(measured(rate, 2, 3) if given.quick else measured(rate, given.updates, given.rounds))
    rows = [[link.rate, f"{link.plain_ms:.1f}", str(link.delayed), str(link.overlapped)] for link in found]
    columns = ["link", "plain update, ms", "delay 1 ÷ plain", "delay 1 and ahead 1 ÷ plain"]
    title = f"Two ranks, {sum(p.numel() for p in network().parameters()):,} parameters, batch {BATCH}"
    show([Report(title=title, columns=columns, rows=rows)], markdown=given.markdown)
    if given.jsonl:
        keep(given.jsonl, found)


if __name__ == "__main__":
    main()
