"""A rank of test_exported_shards.py: a run of each engine; rank 0 keeps what the live modules hold.

Words: a folder, and engines as ZERO-PRECISION.
"""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from distgrow import RunSpec, budget, constant, constant_lr, ema, fit
from distgrow.checkpoint.spec import Checkpointing
from distgrow.distributed.world import World, joined
from distgrow.engine.spec import DeepSpeed
from distgrow.launch.local import leave
from distgrow.optim.adamw import AdamW
from distgrow.optim.groups import ParameterGroup


class Tied(nn.Module):
    """A model of odd sizes with tied weights, statistics, frozen parameters and a part called model.

    DeepSpeed leaves buffers in float32, in which BatchNorm cannot train on bfloat16.
    """

    def __init__(self, *, half: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5) if half else nn.BatchNorm1d(5)
        self.register_buffer("range", torch.linspace(0, 1, 5))
        self.frozen, self.scale = nn.Linear(5, 7), nn.Parameter(torch.full((1,), 1.5))
        self.frozen.requires_grad_(False)
        self.last.weight = self.model.weight

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(self.norm(self.model(rows))) * self.scale + self.frozen(rows)[:, :5]


class Criterion(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(3))

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]) * self.temperature.mean(), batch[1])


def states(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of what a module holds, gathered from all ranks. Collective."""
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def once(engine: DeepSpeed, folder: Path, world: World) -> dict[str, dict[str, Tensor]]:
    """Return what the model holds after a run, and what it held while its average was evaluated."""
    numbers, seen = torch.Generator().manual_seed(1), list[dict[str, Tensor]]()
    rows = [(torch.randn(5, generator=numbers), k % 5) for k in range(32)]

    def metrics(model: nn.Module, _: Any) -> dict[str, float]:
        seen.append(states(model))
        return {"score": 0.0}

    model = Tied(half=engine.precision != "float32")
    fit(
        model, Criterion(), rows, test=rows[:2], metrics=metrics, growth=constant(8), lr=constant_lr(0.1),
        budget=budget(steps=4), average=ema(samples=20), engine=engine, world=world,
        optimizer=AdamW(weight_decay=0.1, groups=[ParameterGroup(match="norm", weight_decay=0.0)]),
        run=RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=2, keep=9)),
    )  # fmt: skip
    return {"live": states(model), "before": seen[-2], "average": seen[-1]}


def main(folder: Path, *names: str) -> None:
    """All engines, one after the other, in one process group."""
    words = {name: name.partition("-") for name in names}
    engines = {
        name: DeepSpeed.model_validate({"zero": int(zero), "precision": precision, "max_micro": 4})
        for name, (zero, _, precision) in words.items()
    }
    with joined("cpu", alone=True) as world:
        found = {name: once(engine, folder / name, world) for name, engine in engines.items()}
        if world.rank == 0:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    leave()
