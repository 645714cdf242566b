"""A rank of test_deepspeed.py: the same twenty updates by every engine; rank 0 writes all parameters to a file."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distgrow import SGD, AdamW, RunSpec, budget, every, exponential, fit, sqrt_lr
from distgrow.data.datasets import digits
from distgrow.distributed.world import joined
from distgrow.engine.spec import DeepSpeed, EngineSpec, Torch
from distgrow.launch.local import leave
from distgrow.optim import Optimizer

ENGINES: dict[str, EngineSpec] = {
    "torch": Torch(max_micro=6),
    "zero 1": DeepSpeed(zero=1, max_micro=6),
    "zero 2": DeepSpeed(zero=2, max_micro=6),
    "zero 3": DeepSpeed(zero=3, max_micro=6),
}
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": SGD(momentum=0.9, nesterov=True, weight_decay=1e-3, clip=1.0),
    "adamw": AdamW(),
}


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(engine: EngineSpec, optimizer: Optimizer, folder: Path) -> torch.Tensor:
    """All parameters after a run over three stages, flat."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, 10))
    train, test = digits()
    rate = 0.1 if isinstance(optimizer, SGD) else 0.003
    result = fit(
        model, loss, train, test=test, growth=exponential(9, 2, 36), stages=every(steps=7), lr=sqrt_lr(rate),
        budget=budget(steps=20), optimizer=optimizer, engine=engine, run=RunSpec(dir=str(folder)),
    )  # fmt: skip
    assert result.progress.stage == 2
    with gathered(model):
        return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def gathered(model: nn.Module) -> Any:
    """ZeRO 3's parameters are whole within."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))


def main(folder: Path) -> None:
    """All engines and optimizers, one after the other, in one process group."""
    with joined("cpu", alone=True) as world:
        found = {
            f"{engine}, {optimizer}": trained(spec, settings, folder / f"{engine}-{optimizer}")
            for optimizer, settings in OPTIMIZERS.items()
            for engine, spec in ENGINES.items()
        }
        if world.rank == 0:
            torch.save(found, folder / "parameters.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
