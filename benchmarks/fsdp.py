"""What engine.kind=fsdp costs per update, against a hand-written fully_shard loop and distgrow's own ZeRO.

`python benchmarks/fsdp.py` measures two processes on this machine, with gloo; every rank uses one thread. The model has
six residual blocks, each a unit, and AdamW.
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from loops import LR_BASE, Rows, build_job, cross_entropy
from overhead import block, distgrow_block
from paired import Report, Spread, arguments, in_two_processes, interleave, keep, ratio, show
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from distgrow.data import datasets
from distgrow.distributed.environment import launched, place
from distgrow.distributed.world import World, joined
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.spec import DeepSpeed
from distgrow.growth.constant import Constant
from distgrow.launch.local import leave
from distgrow.optim.adamw import AdamW
from distgrow.tasks.task import Task

MICRO, UPDATES, LIMIT = 16, 5, 1.03
WIDTH, BLOCKS = 256, 6
#: What is cut, the micro-batches of an update, and the stage of ZeRO that cuts the same.
CASES = (("full", 1, 3), ("full", 4, 3), ("grad_op", 1, 1), ("grad_op", 4, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds per update of distgrow over those of others."""

    shard: str
    world: int
    accum: int
    bare_us: float
    distgrow_us: float
    over_bare: Spread
    over_logging: Spread
    zero: int
    over_zero: Spread | None  #: None: deepspeed is not installed


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus what the layers make of it."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


def task() -> Task:
    """Blocks on the digits in memory."""
    torch.manual_seed(0)
    train, _ = datasets.digits()
    body = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), body, nn.Linear(WIDTH, 10))
    return Task(model=model, loss=cross_entropy, train=train)


class Bare:
    """The loop that one writes by hand around fully_shard."""

    def __init__(self, job: Task, world: World, shard: str, *, logging: bool) -> None:
        self.logging, self.rows, self.world, self.whole = logging, Rows(job, world), world, shard == "grad_op"
        self.model: Any = job.model
        kept: dict[str, Any] = {"reshard_after_forward": False} if self.whole else {}
        for unit in self.model[2]:
            fully_shard(unit, **kept)
        fully_shard(self.model, **kept)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR_BASE, fused=True)
        self.told: list[float] = []

    def updates(self, count: int, micro: int, accum: int) -> None:
        """`count` updates of accum micro-batches of `micro` rows on each rank."""
        for _ in range(count):
            rows = self.rows(micro * accum)
            losses: list[Tensor] = []
            for k in range(accum):
                if accum > 1:
                    self.model.set_requires_gradient_sync(k == accum - 1)
                    if self.whole:
                        self.model.set_reshard_after_backward(k == accum - 1)
                batch = rows[k * micro : (k + 1) * micro]
                loss = F.cross_entropy(self.model(self.rows.inputs[batch]), self.rows.labels[batch])
                (loss / accum if accum > 1 else loss).backward()
                losses.append(loss.detach())
            if self.logging:
                self._log(losses)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _log(self, losses: list[Tensor]) -> None:
        norm: Any = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.told += [norm.full_tensor().item(), *self.world.sum([torch.stack(losses).mean().item()])]


def measure_case(shard: str, accum: int, zero: int, world: World, rounds: int, folder: Path) -> Cost:
    """Blocks of distgrow, ZeRO and the bare loop with and without logging, taking turns."""
    growth, optimizer = Constant(start=MICRO * accum * world.size), AdamW()
    engines: dict[str, Any] = {"fsdp": FSDP.model_validate({"shard": shard, "max_micro": MICRO})}
    try:
        import deepspeed

        assert deepspeed is not None
        engines["zero"] = DeepSpeed.model_validate({"zero": zero, "max_micro": MICRO})
    except ImportError:
        pass
    jobs = {
        name: build_job(task(), world, growth, engine=engine, folder=folder / name, optimizer=optimizer)
        for name, engine in engines.items()
    }
    blocks = {name: distgrow_block(job, UPDATES, world) for name, job in jobs.items()}
    for name, logging in (("bare", False), ("logging", True)):
        loop = Bare(task(), world, shard, logging=logging)
        blocks[name] = block(lambda loop=loop: loop.updates(UPDATES, MICRO, accum), world)
    seconds = interleave(blocks, rounds)
    for job in jobs.values():
        job.events.tracker.close()
    return Cost(
        shard=shard,
        world=world.size,
        accum=accum,
        bare_us=statistics.median(seconds["bare"]) / UPDATES * 1e6,
        distgrow_us=statistics.median(seconds["fsdp"]) / UPDATES * 1e6,
        over_bare=ratio(seconds["fsdp"], seconds["bare"]),
        over_logging=ratio(seconds["fsdp"], seconds["logging"]),
        zero=zero,
        over_zero=ratio(seconds["fsdp"], seconds["zero"]) if "zero" in seconds else None,
    )


def measure(*, quick: bool) -> Iterator[Cost]:
    """Every row. Collective: every rank must call."""
    torch.set_num_threads(1)
    with joined("cpu", alone=True) as world, tempfile.TemporaryDirectory() as folder:
        for shard, accum, zero in CASES:
            yield measure_case(shard, accum, zero, world, 2 if quick else 40, Path(folder))


def cells(row: Cost) -> list[str]:
    """Return a row of the table."""
    return [
        row.shard,
        f"{row.world} × {MICRO} × {row.accum}",
        f"{row.bare_us:,.0f}",
        f"{row.distgrow_us:,.0f}",
        str(row.over_bare),
        f"≤ {LIMIT:.2f} {'met' if row.over_bare.median <= LIMIT else 'missed'}",
        str(row.over_logging),
        "–" if row.over_zero is None else f"{row.over_zero} of ZeRO {row.zero}",
    ]


def main() -> None:
    """Measure, keep, show."""
    options = arguments(__doc__).parse_args()
    if launched():
        rows = list(measure(quick=options.quick))
        if place()[0] == 0:
            keep(options.jsonl, rows)
        leave()
    told = in_two_processes(__file__, *(["--quick"] if options.quick else []))
    rows = [Cost(**{key: value for key, value in row.items() if key != "benchmark"}) for row in told]
    if options.jsonl:
        keep(options.jsonl, rows)
    columns = ["shard", "world × micro × accum", "bare µs", "distgrow µs", "÷ bare", "target", "÷ logging", "÷ ZeRO"]
    title = "Time per update, engine.kind=fsdp over others: median of paired ratios (quartiles)"
    show([Report(title=title, columns=columns, rows=[cells(row) for row in rows])], markdown=options.markdown)


if __name__ == "__main__":
    main()
