"""A rank of test_items_ranks.py: runs with a loss over items, some micro-batches and one batch without any."""

import sys
from pathlib import Path
from typing import Any

import torch
from optimizers import union
from torch import Tensor, nn
from torch.nn import functional as F

from distgrow import RunSpec, budget, constant_lr, fit, steps
from distgrow.core.noise_stats import Measuring
from distgrow.distributed.world import World, joined
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.spec import DeepSpeed, EngineSpec, Torch
from distgrow.launch.local import leave
from distgrow.optim import OptimizerSpec
from distgrow.optim.adamw import AdamW
from distgrow.optim.sgd import SGD
from distgrow.training.spec import Evaluation

#: Micro-batches of at most two rows: with two ranks, some have no items.
ENGINES: dict[str, EngineSpec] = {
    "torch": Torch(max_micro=2),
    "float64": Torch(max_micro=2, precision="float64"),
    "zero 1": DeepSpeed(zero=1, max_micro=2),
    "zero 2": DeepSpeed(zero=2, max_micro=2),
    "zero 3": DeepSpeed(zero=3, max_micro=2),
    "full": FSDP(max_micro=2, wrap=["Linear"]),
    "grad_op": FSDP(max_micro=2, shard="grad_op", reduce="every"),
    "zero 1, bfloat16": DeepSpeed(zero=1, max_micro=2, precision="bfloat16"),
    "zero 2, bfloat16": DeepSpeed(zero=2, max_micro=2, precision="bfloat16"),
    "full, bfloat16": FSDP(max_micro=2, precision="bfloat16"),
}
#: Those that need whole parameters train under torch alone.
OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": AdamW(weight_decay=0.1),
    "clipped": SGD(momentum=0.9, clip=0.3),
    **{spec().name: spec(clip=0.3) for spec in union() if spec.per_tensor},
}
BATCH, UPDATES = 8, 6


class Texts(torch.utils.data.Dataset[Any]):
    """Rows of 0 to 7 labels that count, most of 0: some batches count nothing."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 11, (BATCH * UPDATES, 7), generator=generator)
        self.labels = torch.randint(0, 11, (BATCH * UPDATES, 7), generator=generator)
        for k, row in enumerate(self.labels):
            row[0 if k % 5 else 1 + k % 7 :] = -100

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index], self.labels[index]


def engines(optimizer: OptimizerSpec) -> dict[str, EngineSpec]:
    """Return the engines that can train with an optimizer."""
    return {"float64": ENGINES["float64"]} if optimizer.per_tensor else ENGINES


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def items(batch: Any) -> Tensor:
    return batch[1].ne(-100).sum()


def trained(engine: EngineSpec, optimizer: OptimizerSpec, folder: Path, world: World, *, whole: bool) -> Tensor:
    """Return all parameters after the run, flat; `whole` gives its batches in one micro-batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))
    engine = engine.model_copy(update={"max_micro": BATCH}) if whole else engine
    fit(
        model, loss, Texts(), items=items, growth=steps([BATCH]), budget=budget(steps=UPDATES), lr=constant_lr(0.05),
        optimizer=optimizer, engine=engine, world=world,
        run=RunSpec(dir=str(folder), noise=Measuring(every=1), eval=Evaluation(every_steps=2)), test=Texts(),
    )  # fmt: skip
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])


def main(folder: Path) -> None:
    """All engines and optimizers, one after the other, in one process group."""
    with joined("cpu", alone=True) as world:
        found = {
            f"{engine}, {name}": trained(spec, optimizer, folder / f"{engine}-{name}", world, whole=False)
            for name, optimizer in OPTIMIZERS.items()
            for engine, spec in engines(optimizer).items()
        }
        if world.rank == 0:
            torch.save(found, folder / "parameters.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
