"""A rank of test_odd_shards.py: models of uncommon make in shards; the last rank writes what each run gives back."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distgrow import LogSamples, RunSpec, budget, constant_lr, every, fit, steps
from distgrow.data.seeding import seed_generators
from distgrow.distributed.world import World, joined
from distgrow.engine.fsdp.meta import Maker
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.spec import EngineSpec, Torch
from distgrow.launch.local import leave
from distgrow.training.spec import Evaluation

ROWS = TensorDataset(torch.randn(48, 6, generator=torch.Generator().manual_seed(0)), torch.arange(48) % 2)
TEST = TensorDataset(ROWS.tensors[0][:5], ROWS.tensors[1][:5])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Tied(nn.Module):
    """The first and the last layer have one weight; a block is frozen; a norm has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out, self.head = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = nn.BatchNorm1d(6)
        self.out.weight = self.into.weight
        self.layers[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.out(x) + 0 * self.norm(x))


class Branched(nn.Module):
    """A layer for all rows, another for rare ones alone: without such a row it takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.rare = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, rare = self.all(x), x[:, 0] > 1
        return torch.where(rare[:, None], self.rare(x), out) if rare.any() else out


class Parted(nn.Module):
    """A loss calls its parts, and never the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.ModuleList(Layer() for _ in range(2)), nn.Linear(6, 2)


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.scale * model(batch[0]), batch[1])


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def of_parts(model: Any, batch: Any) -> Tensor:
    x = batch[0]
    for layer in model.encoder:
        x = layer(x)
    return nn.functional.cross_entropy(model.decoder(x), batch[1])


def called(model: nn.Module) -> list[float]:
    """What a hook makes of a model that it calls."""
    return model(TEST.tensors[0]).flatten().tolist()


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that is built already, over the whole parameters."""
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": [], "weight_decay": 0.1}]
    groups[1]["params"] = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


class Filled(Tied):
    """A model that is built without numbers, and says how those begin that have no reset_parameters."""

    def __init__(self) -> None:
        with torch.device("meta"):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(6))

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            nn.init.normal_(self.shift, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.shift)


MICRO: dict[str, Any] = {"max_micro": 4}
#: Model, loss and what to shard by.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, FSDP]] = {
    "tied": (Tied, loss, FSDP(checkpoint_blocks="all", **MICRO)),
    "branched": (Branched, loss, FSDP(find_unused=True, **MICRO)),
    "filled": (Filled, loss, FSDP(**MICRO)),
    "parted": (Parted, of_parts, FSDP(shard="grad_op", **MICRO)),
    "scaled": (Tied, Scaled, FSDP(**MICRO)),
    "given": (Tied, loss, FSDP(reduce="every", **MICRO)),
    "compiled": (Tied, loss, FSDP(compile=True, **MICRO)),
    "half": (Parted, of_parts, FSDP(precision="bfloat16", **MICRO)),
}


def trained(case: str, engine: EngineSpec | None, folder: Path, world: World) -> dict[str, Tensor]:
    """The state that a run of two stages gives back."""
    make, judge, sharding = CASES[case]
    if engine is None:
        engine = sharding
    torch.manual_seed(0)
    model = filled() if case == "filled" and isinstance(engine, Torch) else make()
    judge = judge() if isinstance(judge, type) else judge
    optimizer = momentum(model) if case == "given" else None
    hooks = [] if judge is of_parts else [LogSamples(called)]
    fit(
        model, judge, ROWS, growth=steps([8, 16]), stages=every(steps=3), lr=constant_lr(0.1), test=TEST,
        budget=budget(steps=6), engine=engine, world=world, optimizer=optimizer, hooks=hooks,
        run=RunSpec(dir=str(folder), eval=Evaluation(every_steps=2)),
    )  # fmt: skip
    own = judge.state_dict() if isinstance(judge, nn.Module) else {}
    return {**model.state_dict(), **{f"loss.{name}": value for name, value in own.items()}}


def main(folder: Path, cases: list[str]) -> None:
    """Train all cases, one after the other, in one process group."""
    with joined("cpu", alone=True) as world:
        for case in cases:
            state = trained(case, None, folder / case, world)
            if world.rank == world.size - 1:
                torch.save(state, folder / f"{case}.pt")


def alone(case: str, folder: Path) -> dict[str, Tensor]:
    """What plain torch gives back in one process."""
    return trained(case, Torch(max_micro=8), folder, World())


def filled() -> nn.Module:
    """The model as one process makes all of it at once."""
    model = Filled()
    seed_generators(0)
    Maker(model, torch.device("cpu"), torch.initial_seed()).make(model)
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
