"""A rank of test_expert_ranks.py: puzzles, a transformer with experts whose number rises, growth and accumulation."""

import sys
from pathlib import Path
from typing import Any

from distgrow.config.load import parse
from distgrow.launch.local import leave

SAMPLES = 240


def config(folder: Path, **engine: Any) -> dict[str, Any]:
    return {
        "task": {"kind": "raven", "features": 2, "rows": 120, "test": 20},
        "model": {
            "kind": "gpt", "layers": 2, "width": 8, "heads": 2,
            "experts": 4, "active": {"start": 1, "end": 4}, "capacity": 1.25, "balance": 0.1,
        },
        "optimizer": {"kind": "adamw"},
        "growth": {"kind": "exponential", "start": 6, "factor": 2, "cap": 24},
        "stages": {"every": {"samples": 60}},
        "lr": {"base": 0.01},
        "engine": {"kind": "torch", "precision": "float64", "max_micro": 3} | engine,
        "budget": {"samples": SAMPLES},
        "run": {
            "dir": str(folder), "seed": 3, "checkpoint": {"every_steps": 2, "keep": 99}, "eval": {"every_steps": 3},
            "probe": {"every_epochs": 1},
        },
    }  # fmt: skip


def trained(folder: Path, *, resume: bool = False, **engine: Any) -> None:
    parse(config(folder, **engine)).fit(resume=resume)


if __name__ == "__main__":
    zero = [int(word.removeprefix("zero=")) for word in sys.argv if word.startswith("zero=")]
    sharded = {"kind": "deepspeed", "precision": "float32", "zero": zero[0]} if zero else {}
    if "fsdp" in sys.argv:
        sharded = {"kind": "fsdp", "precision": "float32"}
    trained(Path(sys.argv[1]), resume="resume" in sys.argv, **sharded)
    leave()
