"""A rank of test_branched_ranks.py: runs with branches beside runs of their decided schedules; rank 0 writes it."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from parity import ENGINES, loss
from torch import nn

from distgrow import AdamW, RunSpec, budget, constant, every, fit, sqrt_lr, steps
from distgrow.data.datasets import Arrays, digits
from distgrow.distributed.world import World, joined
from distgrow.engine.spec import EngineSpec
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.certified import Certified
from distgrow.growth.learned import Learned
from distgrow.launch.local import leave

SHARED: dict[str, Any] = {"start": 9, "cap": 36, "windows": 4, "cost": 0.5}
#: Growth whose tests the larger batch never wins, so that the state at the other one's end comes back; and always.
NEVER, ALWAYS = Certified(**SHARED, tolerance=0, confidence=1e9), Certified(**SHARED, tolerance=1e9)
LEARNED = Learned(**SHARED, tolerance=1e9)


def trained(
    growth: GrowthPolicy, engine: EngineSpec, folder: Path, world: World, **settings: Any
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """All parameters after a run, flat, and its events."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 17), nn.Tanh(), nn.Linear(17, 10))
    train, test = (Arrays(part.inputs[:101], part.labels[:101]) for part in digits())
    fit(
        model, loss, train, test=test, growth=growth, lr=sqrt_lr(0.01), budget=budget(samples=900),
        optimizer=AdamW(), engine=engine, run=RunSpec(dir=str(folder)), world=world, **settings,
    )  # fmt: skip
    world.sum([0.0])
    lines = (folder / "metrics.jsonl").read_text().splitlines() if world.rank == 0 else []
    parameters = torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])
    return parameters, world.on_rank0(lambda: [json.loads(line) for line in lines])


def compared(name: str, folder: Path, world: World) -> dict[str, Any]:
    """Whether runs with branches end as those of their decided schedules, to the bit, and their verdicts."""
    engine, found = ENGINES[name], dict[str, Any]()
    never, lines = trained(NEVER, engine, folder / "never", world)
    given, _ = trained(constant(9), engine, folder / "constant", world)
    found["never"] = bool(torch.equal(never, given))
    found["never won"] = [line["winner"] for line in lines if line["event"] == "branches"]
    for kind, growth in {"always": ALWAYS, "learned": LEARNED}.items():
        grown, lines = trained(growth, engine, folder / kind, world)
        begun = list({line["stage"]: line["samples"] for line in lines if line["event"] == "stage"}.values())
        lengths = [b - a for a, b in zip(begun, begun[1:], strict=False)]
        schedule = {"stages": every(samples=lengths)}
        given, _ = trained(steps([9, 18, 36][: len(begun)]), engine, folder / f"{kind}, given", world, **schedule)
        found[kind] = bool(torch.equal(grown, given))
        found[f"{kind} won"] = [line["winner"] for line in lines if line["event"] == "branches"]
        tests = [line for line in lines if line["event"] == "branches"]
        found[f"{kind} probe"] = [tests[-1]["sfo_probe"], sum(len(t["losses"][0]) * t["window"] for t in tests)]
        found[f"{kind} losses"] = [test["losses"] for test in tests]
    return found


def main(folder: Path, names: list[str]) -> None:
    """The engines of these names, one after the other, in one process group."""
    with joined("cpu", alone=True) as world:
        found = {name: compared(name, folder / name, world) for name in names}
        if world.rank == 0:
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
