"""Whether the noise scale in the metric of AdamW's steps foretells the useful batch better than the plain one.

From checkpoints along a run of AdamW at a constant batch, `probe-batch` trains branches with 1, 2, 4 … times the batch
on the same samples. By how much a branch lowers the test loss is fitted by D(b) = D₀/(1 + b/B): B is the batch that
lowers it half as much a sample as the smallest would. Beside it stand both noise scales at that checkpoint, measured
while training. Only their ratios to B matter: the one that keeps closer to a constant foretells B better.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paired import Report, arguments, keep, show

NORMS = ("plain", "preconditioned")
ADAM = {"kind": "adamw", "beta2": 0.95, "weight_decay": 0.1, "clip": 1.0}
TASKS: dict[str, dict[str, Any]] = {
    "digits, MLP": {"task": {"kind": "digits"}, "model": {"kind": "mlp"}, "lr": {"base": 0.001}},
    "text, small GPT": {
        "task": {"kind": "text", "length": 32},
        "model": {"kind": "gpt", "layers": 2, "width": 64, "heads": 2},
        "lr": {"base": 0.001},
    },
}
BATCH, MOST = 8, 64  #: of the run; times that of the largest branch
#: Growth that measures, and has no time to grow.
GROWTH = {"kind": "noise_scale", "start": BATCH, "cap": 2 * BATCH, "min_stage": {"samples": 10**12}}
PLACES = (0.05, 0.2, 0.5, 1.0)  #: of the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Hold what was found at one checkpoint, in samples."""

    task: str
    seed: int
    samples: int
    branches: float  #: B by branches; NaN if no branch lowered the loss, inf if the largest did as well as the smallest
    plain: float  #: inf if the gradient is lost in noise
    preconditioned: float


def places(
    folder: Path, task: str, seed: int, samples: int, branch: int, at: Sequence[float] = PLACES
) -> Iterator[Place]:
    """Train once with each norm, which changes no update, and branch at every place."""
    every = samples // BATCH // 20
    runs = {norm: folder / f"{task}-{seed}-{norm}" for norm in NORMS}
    for norm, run in runs.items():
        config = {
            **TASKS[task], "optimizer": ADAM, "engine": {"device": "cpu", "max_micro": BATCH * MOST},
            "growth": {**GROWTH, "norm": norm},
            "budget": {"samples": samples},
            "run": {
                "dir": str(run), "seed": seed, "noise": {"every": 1, "window": 100}, "eval": {"every_steps": every},
                "checkpoint": {"every_steps": every, "keep": 100},
            },
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        quietly("train", str(folder / "config.json"))
    scales = {norm: lines(run / "metrics.jsonl", "noise_scale") for norm, run in runs.items()}
    before = lines(runs["plain"] / "metrics.jsonl", "loss", event="eval")
    for place in at:
        step = round(20 * place) * every
        loss = branches(runs["plain"], step, branch, folder / f"{task}-{seed}-{step}")
        yield Place(
            task=task, seed=seed, samples=step * BATCH, branches=half(before[step], loss),
            **{norm: scales[norm].get(step, math.inf) for norm in NORMS},
        )  # fmt: skip


def quietly(*words: str) -> None:
    """Run the command line; a failure is told."""
    done = subprocess.run([sys.executable, "-m", "distgrow", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)


def lines(file: Path, key: str, event: str = "step") -> dict[int, float]:
    """Return a key's values by their update."""
    found = map(json.loads, file.read_text().splitlines())
    return {line["step"]: line[key] for line in found if line["event"] == event and line.get(key) is not None}


def branches(run: Path, step: int, samples: int, out: Path) -> dict[int, float]:
    """Return the test loss of each branch, by its batch."""
    place = f"{run}/checkpoints/step-{step:08d}"
    quietly("probe-batch", place, "--samples", str(samples), "--up-to", str(MOST), "--out", str(out))
    (file,) = out.glob("*.jsonl")
    found = map(json.loads, file.read_text().splitlines())
    return {line["batch"]: line["test_loss"] for line in found if line["event"] == "branch"}


def half(before: float, after: dict[int, float]) -> float:
    """Return B of D(b) = D₀/(1 + b/B), by least squares of 1/D over the batches that lower the loss."""
    pairs = [(batch, 1 / (before - loss)) for batch, loss in after.items() if loss < before]
    if len(pairs) < 3:
        return math.nan
    slope, start = np.polyfit([batch for batch, _ in pairs], [inverse for _, inverse in pairs], 1)
    return math.inf if slope <= 0 else float(start / slope) if start > 0 else math.nan


def scatter(rows: Sequence[Place], norm: str) -> str:
    """Return the standard deviation of log₂(noise scale/B), in doublings, over the places where all are known."""
    known = [
        math.log2(getattr(row, norm) / row.branches)
        for row in rows
        if all(0 < value < math.inf for value in (row.branches, row.plain, row.preconditioned))
    ]
    return f"{statistics.stdev(known):.2f} ({len(known)} places)" if len(known) > 1 else "—"


def reports(rows: list[Place]) -> list[Report]:
    """Return the places, and how far the ratios scatter."""
    shown = Report(
        title="Batch of half the progress per sample, by branches, and noise scales at the same checkpoint, samples",
        columns=["task", "seed", "samples", "branches", *NORMS],
        rows=[
            [
                row.task, str(row.seed), f"{row.samples:,}",
                *(f"{value:,.0f}" if math.isfinite(value) else "—" for value in (row.branches, row.plain)),
                f"{row.preconditioned:,.0f}" if math.isfinite(row.preconditioned) else "—",
            ]
            for row in rows
        ],
    )  # fmt: skip
    tasks = {task: [row for row in rows if row.task == task] for task in TASKS}
    spread = Report(
        title="Scatter of noise scale ÷ branches: standard deviation of its log₂, in doublings",
        columns=["task", *NORMS],
        rows=[[task, *(scatter(of, norm) for norm in NORMS)] for task, of in (*tasks.items(), ("both", rows))],
    )
    return [shown, spread]


def main() -> None:
    """Measure, keep, show."""
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=20_000, help="the budget of each run")
    parser.add_argument("--branch", type=int, default=4_096, help="samples of each branch")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each task")
    options = parser.parse_args()
    samples, branch, seeds = (1_600, 4_096, 1) if options.quick else (options.samples, options.branch, options.seeds)
    if options.quick:
        TASKS["text, small GPT"]["task"]["test"] = 0.005  # the whole tenth takes minutes to evaluate
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for task in TASKS
            for seed in range(seeds)
            for row in places(Path(folder), task, seed, samples, branch, PLACES[-1:] if options.quick else PLACES)
        ]
    if options.jsonl:
        keep(options.jsonl, rows)
    show(reports(rows), markdown=options.markdown)


if __name__ == "__main__":
    main()
