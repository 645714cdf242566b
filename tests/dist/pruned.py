"""A rank of test_pruned_ranks.py: a run that grows and is pruned, by several engines; stopped halfway and resumed."""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgrow import RunSpec, budget, ema, every, exponential, fit, load_weights, sparsity, sqrt_lr
from distgrow.checkpoint.spec import Checkpointing
from distgrow.distributed.world import World, joined
from distgrow.engine.spec import DeepSpeed, EngineSpec, Torch
from distgrow.launch.local import leave
from distgrow.optim import OptimizerSpec
from distgrow.optim.adamw import AdamW
from distgrow.optim.muon import Muon

ENGINES: dict[str, EngineSpec] = {
    "float64": Torch(max_micro=3, precision="float64"),
    "zero 1": DeepSpeed(zero=1, max_micro=3),
}
OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": AdamW(weight_decay=0.1, clip=0.5),
    "muon": Muon(ns_precision="float32"),
}
CASES = [(engine, name) for engine in ENGINES for name in OPTIMIZERS]
SAMPLES = 240


def data() -> list[tuple[Tensor, int]]:
    numbers = torch.Generator().manual_seed(1)
    return [(torch.randn(3, generator=numbers, dtype=torch.float64), k % 2) for k in range(64)]


def loss(model: nn.Module, batch: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(batch[0].to(dtype)), batch[1])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 2))


def fitted(case: tuple[str, str], folder: Path, world: World, *, resume: bool = False) -> dict[str, Tensor]:
    """Return the parameters after a run, and their average."""
    engine, optimizer = case
    model = network()
    fit(
        model, loss, data(), growth=exponential(4, 2, 16), stages=every(samples=80), budget=budget(samples=SAMPLES),
        lr=sqrt_lr(0.02), optimizer=OPTIMIZERS[optimizer], engine=ENGINES[engine], world=world, resume=resume,
        sparsity=sparsity(0.8, every=0.1, keep_dense=["^4"]), average=ema(samples=50),
        run=RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=8, keep=99)),
    )  # fmt: skip
    found = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    averaged = network().double()
    world.on_rank0(lambda: load_weights(averaged, folder, average=True) if world.rank == 0 else None)
    return found | {f"average of {name}": p.detach().clone() for name, p in averaged.named_parameters()}


def trained(case: tuple[str, str], folder: Path, world: World) -> dict[str, dict[str, Tensor]]:
    """Return the same of a run that was never stopped, and of one resumed while it was being pruned."""
    found = {"whole": fitted(case, folder, world)}

    def forget() -> None:
        kept = sorted((folder / "checkpoints").iterdir())
        for checkpoint in kept[len(kept) // 2 :]:
            shutil.rmtree(checkpoint)

    world.on_rank0(forget)
    return found | {"resumed": fitted(case, folder, world, resume=True)}


def main(folder: Path) -> None:
    """All cases, one after the other, in one process group."""
    with joined("cpu", alone=True) as world:
        found = {f"{case[0]}, {case[1]}": trained(case, folder / "-".join(case), world) for case in CASES}
        if world.rank == 0:
            torch.save(found, folder / "parameters.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
