"""A rank of test_sharded_ranks.py: the same updates by torch and by every sharding; rank 0 writes all parameters."""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgrow import RunSpec, budget, ema, every, exponential, fit, sqrt_lr
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.noise_stats import Measuring
from distgrow.data.datasets import digits
from distgrow.distributed.world import World, joined
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.spec import EngineSpec, Torch
from distgrow.launch.local import leave
from distgrow.optim import OptimizerSpec
from distgrow.optim.adamw import AdamW
from distgrow.optim.groups import ParameterGroup
from distgrow.optim.lamb import LAMB
from distgrow.optim.lars import LARS
from distgrow.optim.muon import Muon
from distgrow.optim.sgd import SGD

ENGINES: dict[str, EngineSpec] = {
    "torch": Torch(max_micro=3),
    "full": FSDP(max_micro=3),
    "grad_op": FSDP(max_micro=3, shard="grad_op", checkpoint_blocks="second"),
    "hybrid": FSDP(max_micro=3, shard="hybrid", replicas=2),
    "hybrid, every": FSDP(max_micro=3, shard="hybrid", replicas=2, reduce="every"),
    "every": FSDP(max_micro=3, wrap=["Block"], reduce="every", checkpoint_blocks="all"),
}
OPTIMIZERS: dict[str, OptimizerSpec] = {
    "sgd": SGD(momentum=0.9, weight_decay=0.01, clip=0.5),
    "adamw": AdamW(no_decay=True, eps=1e-3, groups=[ParameterGroup(match="out", ndim=2, lr_scale=0.3)]),
    "muon": Muon(clip=0.5, ns_precision="float32"),
    "lamb": LAMB(weight_decay=0.1),
    "lars": LARS(momentum=0.9, trust=0.1),
}
#: Whose runs are resumed midway, too.
RESUMED = ("full", "hybrid")


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks of widths that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(64, 15), nn.Linear(15, 10)
        self.blocks = nn.ModuleList(Block(15) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def rows() -> tuple[Any, Any]:
    """Digits to train on, and a few to evaluate."""
    train, test = digits()
    return train, [test[k] for k in range(50)]


def once(engine: EngineSpec, optimizer: OptimizerSpec, folder: Path, world: World, *, resume: bool = False) -> Tensor:
    """All parameters after 20 updates over three stages."""
    model, (train, test) = Net(), rows()
    rate = 0.1 if optimizer.scaling == "linear" else 0.003
    result = fit(
        model, loss, train, test=test, growth=exponential(9, 2, 36), stages=every(steps=7), lr=sqrt_lr(rate),
        budget=budget(steps=20), optimizer=optimizer, engine=engine, world=world, resume=resume,
        average=ema(samples=60),
        run=RunSpec(dir=str(folder), noise=Measuring(every=1), checkpoint=Checkpointing(every_steps=12, keep=9)),
    )  # fmt: skip
    assert result.progress.stage == 2
    return flat(model)


def flat(model: nn.Module) -> Tensor:
    """All parameters, which are whole again."""
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def resumed(engine: EngineSpec, optimizer: OptimizerSpec, folder: Path, whole: Path, world: World) -> Tensor:
    """All parameters after a run that goes on from the middle of another one."""

    def prepare() -> None:
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / "checkpoints" / "step-00000020")

    world.on_rank0(prepare)
    return once(engine, optimizer, folder, world, resume=True)


def main(folder: Path, optimizers: list[str], engines: list[str]) -> None:
    """All engines and optimizers, one after the other, in one process group."""
    with joined("cpu", alone=True) as world:
        found: dict[str, Tensor] = {}
        for name in optimizers:
            for kind in engines:
                engine, optimizer, there = ENGINES[kind], OPTIMIZERS[name], folder / f"{kind}-{name}"
                found[f"{kind}, {name}"] = once(engine, optimizer, there, world)
                if kind in RESUMED:
                    again = folder / f"{kind}-{name}-resumed"
                    found[f"{kind}, {name}, resumed"] = resumed(engine, optimizer, again, there, world)
        if world.rank == 0:
            torch.save(found, folder / "parameters.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(words.split("; ") for words in sys.argv[2:]))
    leave()
