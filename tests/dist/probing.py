"""A rank of test_probed_ranks.py: the same run by every engine, with exact probes and without; rank 0 writes it."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from parity import ENGINES, loss
from torch import nn

from distgrow import SGD, RunSpec, budget, every, exponential, fit, sqrt_lr
from distgrow.core.probe_schedule import Probing
from distgrow.data.datasets import Arrays, digits
from distgrow.distributed.world import World, joined
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.spec import DeepSpeed, EngineSpec
from distgrow.launch.local import leave

HALF = {"zero 3, bfloat16": DeepSpeed(zero=3, max_micro=6, precision="bfloat16")}
FURTHER = {**HALF, "hybrid": FSDP(max_micro=6, shard="hybrid", replicas=2)}


def trained(engine: EngineSpec, folder: Path, world: World, probe: Probing) -> torch.Tensor:
    """All parameters after a run over two stages, flat."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 17), nn.Tanh(), nn.Linear(17, 10))
    train, _ = digits()
    train = Arrays(train.inputs[:41], train.labels[:41])
    fit(
        model, loss, train, growth=exponential(9, 2, 18), stages=every(steps=4), lr=sqrt_lr(0.1),
        budget=budget(steps=8), optimizer=SGD(momentum=0.9, weight_decay=0.01), engine=engine,
        run=RunSpec(dir=str(folder), probe=probe), world=world,
    )  # fmt: skip
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def main(folder: Path, names: list[str]) -> None:
    """The engines of these names, one after the other, in one process group."""
    probe = Probing(every_epochs=1.5, rows=16, curvature=True, parts=20, tolerance=1e-3)
    with joined("cpu", alone=True) as world:
        found: dict[str, Any] = {}
        for name in names:
            spec = {**ENGINES, **FURTHER}[name]
            plain = trained(spec, folder / f"{name}, plain", world, Probing())
            probed = trained(spec, folder / name, world, probe)
            found[name] = {"same": bool(torch.equal(plain, probed))}
        if world.rank == 0:
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
