"""What an average of the parameters gives, and what it costs.

Held-out loss of a small GPT on the sources of Python's standard library after the same number of samples, for several
schedules, of the parameters themselves and of averages of them: mean over seeds, least and greatest in brackets. Then
the time of an update with an average over that of one without, paired.
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from loops import build, build_job
from overhead import distgrow_block
from paired import Report, Spread, arguments, interleave, keep, ratio, show

from distgrow.config.load import parse
from distgrow.core.average import ema
from distgrow.distributed.world import joined
from distgrow.engine.spec import Torch
from distgrow.growth.constant import Constant

#: Name of a schedule → its overrides of COMMON. All have the same first learning rate.
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant rate, b = 32": {"growth": {"kind": "constant", "start": 32}},
    "constant rate, b = 128": {"growth": {"kind": "constant", "start": 128}},
    "linear decay over the last half, b = 128": {
        "growth": {"kind": "constant", "start": 128},
        "lr": {"base": 0.002, "decay": {"kind": "wsd", "decay": 0.5}},
    },
    "auto, 32 … 1,024": {"growth": {"kind": "auto", "start": 32, "cap": 1024}},
    "late, 32 … 1,024": {"growth": {"kind": "late", "start": 32, "cap": 1024}},
}
#: Averages, by the column that they have.
AVERAGES: dict[str, dict[str, Any]] = {
    "EMA, 5 % of the budget": {"kind": "ema", "horizon": {"fraction": 0.05}},
    "tail, last 25 %": {"kind": "tail", "fraction": 0.25},
}
COMMON: dict[str, Any] = {
    "task": {"kind": "text", "length": 32},
    "model": {"kind": "gpt", "layers": 2, "width": 64, "heads": 2},
    "optimizer": {"kind": "adamw", "beta2": 0.95, "weight_decay": 0.1, "clip": 1.0},
    "lr": {"base": 0.002, "rule": {"kind": "constant"}},
    "engine": {"kind": "torch", "max_micro": 128, "device": "cpu"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Held-out loss at the end of one run."""

    schedule: str
    average: str
    seed: int
    samples: int
    updates: int
    live: float
    averaged: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time of an update with an average over that of one without."""

    model: str
    batch: int
    over_plain: Spread


def gains(folder: Path, *, samples: int, seeds: int) -> Iterator[Gain]:
    """Train every schedule with every average; averages change no update."""
    for seed in range(seeds):
        for schedule, settings in SCHEDULES.items():
            for average, spec in AVERAGES.items():
                place = {"dir": str(folder / f"{seed}-{schedule}-{average}"), "seed": seed, "log_every": 10**6}
                run = parse(
                    {
                        **COMMON, **settings, "average": spec, "budget": {"samples": samples},
                        "run": {**place, "eval": {"every_samples": samples}, "checkpoint": {"every_s": 1e6}},
                    }
                )  # fmt: skip
                result = run.fit(resume=False)
                yield Gain(
                    schedule=schedule, average=average, seed=seed, samples=samples, updates=result.progress.step,
                    live=result.metrics["loss"], averaged=result.metrics["average/loss"],
                )  # fmt: skip


def cost(folder: Path, *, rounds: int) -> Cost:
    """Blocks of the CNN's updates with an average and without, taking turns."""
    micro, updates = 16, 8
    with joined("cpu", alone=True) as world:
        jobs = {
            name: build_job(
                build("cnn"), world, Constant(start=micro), engine=Torch(device="cpu", max_micro=micro),
                folder=folder / name,
            )
            for name in ("plain", "average")
        }  # fmt: skip
        averaging = jobs["average"]
        averaging.controller = replace(averaging.controller, average=ema(samples=10_000))
        blocks = {name: distgrow_block(job, updates, world) for name, job in jobs.items()}
        seconds = interleave(blocks, rounds)
        for job in jobs.values():
            job.events.tracker.close()
    return Cost(model="CNN", batch=micro, over_plain=ratio(seconds["average"], seconds["plain"]))


def reports(rows: list[Gain], costs: list[Cost]) -> list[Report]:
    """Return the two tables."""
    seeds, samples = len({row.seed for row in rows}), rows[0].samples
    table = Report(
        title=f"Held-out loss after {samples:,} samples of 32 bytes, mean over {seeds} seeds (least … greatest)",
        columns=["schedule", "updates", "parameters", *AVERAGES],
        rows=[
            [
                schedule,
                f"{statistics.mean(row.updates for row in rows if row.schedule == schedule):,.0f}",
                _figure([row.live for row in rows if row.schedule == schedule and row.average == next(iter(AVERAGES))]),
                *(
                    _figure([row.averaged for row in rows if (row.schedule, row.average) == (schedule, average)])
                    for average in AVERAGES
                ),
            ]
            for schedule in SCHEDULES
        ],
    )
    paid = Report(
        title="Time of an update with an average over one without: median of paired ratios (quartiles)",
        columns=["model", "batch", "÷ without", "target"],
        rows=[
            [c.model, str(c.batch), str(c.over_plain), f"≤ 1.03 {'met' if c.over_plain.median <= 1.03 else 'missed'}"]
            for c in costs
        ],
    )
    return [table, paid]


def _figure(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} … {max(values):.4f})"


def main() -> None:
    """Measure, keep, show."""
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=60_000, help="the budget of each run")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each schedule")
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples, seeds, rounds = (2048, 1, 4) if options.quick else (options.samples, options.seeds, 100)
    with tempfile.TemporaryDirectory() as folder:
        costs = [cost(Path(folder), rounds=rounds)]
        rows = list(gains(Path(folder), samples=samples, seeds=seeds))
    if options.jsonl:
        keep(options.jsonl, [*rows, *costs])
    show(reports(rows, costs), markdown=options.markdown)


if __name__ == "__main__":
    main()
