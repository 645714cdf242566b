"""What letting an optimizer's memory follow the batch gives: `optimizer.at_growth`.

Held-out loss after the same samples, of a small GPT on the sources of Python's standard library by AdamW, and of an MLP
on digits by SGD with momentum. The batch grows eightfold in three steps, at a constant rate and with η ∝ √b. Mean over
seeds, least and greatest in brackets.
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paired import Report, arguments, keep, show

from distgrow.config.load import parse

#: Name of a variant → `optimizer.at_growth`.
ADAMW: dict[str, dict[str, str]] = {
    "nothing (default)": {},
    "β₂ by samples": {"beta2": "samples"},
    "β₁ by samples": {"momentum": "samples"},
    "λ by samples": {"weight_decay": "samples"},
    "moments reset": {"moments": "reset"},
    "all": {"beta2": "samples", "momentum": "samples", "weight_decay": "samples", "moments": "reset"},
}
SGD: dict[str, dict[str, str]] = {
    "nothing (default)": {},
    "μ by samples": {"momentum": "samples"},
    "moments reset": {"moments": "reset"},
    "all": {"momentum": "samples", "moments": "reset"},
}
GPT: dict[str, Any] = {
    "task": {"kind": "text", "length": 32, "test": 0.02},
    "model": {"kind": "gpt", "layers": 2, "width": 64, "heads": 2},
    "growth": {"kind": "exponential", "start": 32, "factor": 2, "cap": 256},
}
DIGITS: dict[str, Any] = {"growth": {"kind": "exponential", "start": 8, "factor": 2, "cap": 64}}


def adamw(beta2: float) -> dict[str, Any]:
    """Return the settings of AdamW at the first batch."""
    return {"kind": "adamw", "beta2": beta2, "weight_decay": 0.1, "clip": 1.0}


#: Name of a task → its settings, optimizer, first learning rate and variants.
TASKS: dict[str, tuple[dict[str, Any], dict[str, Any], float, dict[str, dict[str, str]]]] = {
    "GPT, AdamW, β₂ = .99": (GPT, adamw(0.99), 0.002, ADAMW),
    "digits, SGD, μ = .9": (DIGITS, {"kind": "sgd", "momentum": 0.9}, 0.02, SGD),
}
RULES = {"constant η": "constant", "η ∝ √b": "sqrt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Held-out loss at the end of one run."""

    task: str
    rule: str
    variant: str
    seed: int
    samples: int
    updates: int
    loss: float


def outcomes(folder: Path, *, samples: int, digits: int, seeds: int) -> Iterator[Outcome]:
    """Train every variant."""
    for seed in range(seeds):
        for task, (settings, optimizer, base, variants) in TASKS.items():
            budget = digits if settings is DIGITS else samples
            for rule, kind in RULES.items():
                for variant, at_growth in variants.items():
                    run = {"dir": str(folder / f"{seed}-{task}-{rule}-{variant}"), "seed": seed, "log_every": 10**6}
                    result = parse(
                        {
                            **settings, "optimizer": {**optimizer, "at_growth": at_growth},
                            "lr": {"base": base, "rule": {"kind": kind}},
                            "stages": {"every": {"samples": budget // 4}}, "budget": {"samples": budget},
                            "engine": {"kind": "torch", "max_micro": 256, "device": "cpu"},
                            "run": {**run, "eval": {"every_samples": budget}, "checkpoint": {"every_s": 1e6}},
                        }
                    ).fit(resume=False)  # fmt: skip
                    yield Outcome(
                        task=task, rule=rule, variant=variant, seed=seed, samples=budget, updates=result.progress.step,
                        loss=result.metrics["loss"],
                    )  # fmt: skip


def reports(rows: list[Outcome]) -> list[Report]:
    """Return a table for each task."""
    return [_report(task, [row for row in rows if row.task == task]) for task in TASKS]


def _report(task: str, rows: list[Outcome]) -> Report:
    seeds, first = len({row.seed for row in rows}), rows[0]
    title = f"{task}: held-out loss after {first.samples:,} samples in {first.updates:,} updates, {seeds} seeds"
    variants = dict.fromkeys(row.variant for row in rows)
    figures = [
        [variant, *(_figure([r.loss for r in rows if (r.variant, r.rule) == (variant, rule)]) for rule in RULES)]
        for variant in variants
    ]
    return Report(title=title, columns=["at_growth", *RULES], rows=figures)


def _figure(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} … {max(values):.4f})"


def main() -> None:
    """Measure, keep, show."""
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=20_000, help="the GPT's budget")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples, digits, seeds = (2048, 512, 1) if options.quick else (options.samples, 11_488, options.seeds)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(outcomes(Path(folder), samples=samples, digits=digits, seeds=seeds))
    if options.jsonl:
        keep(options.jsonl, rows)
    show(reports(rows), markdown=options.markdown)


if __name__ == "__main__":
    main()
