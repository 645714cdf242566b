"""A rank of test_deepspeed.py: the same updates by every engine and optimizer; rank 0 writes all parameters."""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from optimizers import OPTIMIZERS, RESUMED
from torch import nn

from distgrow import RunSpec, budget, ema, every, exponential, fit, sqrt_lr
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.noise_stats import Measuring
from distgrow.data.datasets import digits
from distgrow.distributed.world import World, joined
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.spec import DeepSpeed, EngineSpec, Torch
from distgrow.launch.local import leave
from distgrow.optim import OptimizerSpec

ENGINES: dict[str, EngineSpec] = {
    "torch": Torch(max_micro=6),
    "zero 1": DeepSpeed(zero=1, max_micro=6),
    "zero 2": DeepSpeed(zero=2, max_micro=6),
    "zero 3": DeepSpeed(zero=3, max_micro=6),
    "fsdp": FSDP(max_micro=6),
}


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def resumed(engine: EngineSpec, optimizer: OptimizerSpec, folder: Path, world: World) -> torch.Tensor:
    """All parameters after a run that was resumed midway."""
    once(engine, optimizer, folder, world, resume=False)
    world.on_rank0(lambda: shutil.rmtree(folder / "checkpoints" / "step-00000009"))
    return once(engine, optimizer, folder, world, resume=True)


def once(engine: EngineSpec, optimizer: OptimizerSpec, folder: Path, world: World, *, resume: bool) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, 10))
    train, test = digits()
    rate = 0.1 if optimizer.scaling == "linear" else 0.003
    result = fit(
        model, loss, train, test=test, growth=exponential(9, 2, 36), stages=every(steps=3), lr=sqrt_lr(rate),
        budget=budget(steps=9), optimizer=optimizer, engine=engine, world=world, resume=resume,
        average=ema(samples=60),
        run=RunSpec(dir=str(folder), noise=Measuring(every=1), checkpoint=Checkpointing(every_steps=6, keep=9)),
    )  # fmt: skip
    assert result.progress.stage == 2
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def main(folder: Path) -> None:
    """All engines and optimizers, one after the other, in one process group."""
    with joined("cpu", alone=True) as world:
        found = {
            f"{engine}, {name}": once(spec, optimizer, folder / f"{engine}-{name}", world, resume=False)
            for name, optimizer in OPTIMIZERS.items()
            for engine, spec in ENGINES.items()
        }
        found |= {
            f"{engine}, {name}, resumed": resumed(ENGINES[engine], OPTIMIZERS[name], folder / f"{name}-resumed", world)
            for name, engine in RESUMED.items()
        }
        if world.rank == 0:
            torch.save(found, folder / "parameters.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
