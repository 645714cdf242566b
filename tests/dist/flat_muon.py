"""A rank of test_flat_muon_ranks.py: Muon's updates by torch and on flat shards; rank 0 writes all parameters."""

import sys
from pathlib import Path

import torch
from sharding import once, resumed
from torch import Tensor

from distgrow.core.optimizer_plan import AtGrowth
from distgrow.distributed.world import joined
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.spec import DeepSpeed, EngineSpec, Torch
from distgrow.launch.local import leave
from distgrow.optim.groups import ParameterGroup, Parameters
from distgrow.optim.muon import Muon

#: Buckets of 400 bytes hold no matrix of the model, and make a round of each.
ENGINES: dict[str, EngineSpec] = {
    "torch": Torch(max_micro=3),
    "zero 1": DeepSpeed(zero=1, max_micro=3),
    "zero 2": DeepSpeed(zero=2, max_micro=3, bucket_mb=0.0004),
    "zero 3": DeepSpeed(zero=3, max_micro=3),
    "zero 3, small": DeepSpeed(zero=3, max_micro=3, bucket_mb=0.0004),
    "zero 2, offload": DeepSpeed(zero=2, max_micro=3, offload_optimizer=True),
    "zero 3, offload": DeepSpeed(zero=3, max_micro=3, offload_optimizer=True),
    "fsdp": FSDP(max_micro=3),
}
GROUPS = [ParameterGroup(match="up", lr_scale=0.3, weight_decay=0.02), ParameterGroup(match="norm", lr_scale=2)]
GROWING = AtGrowth(beta2="samples", momentum="samples", weight_decay="samples", moments="reset")
OPTIMIZERS = {
    "clipped": Muon(clip=0.5, ns_precision="float32"),
    "groups": Muon(
        ns_precision="float32", groups=GROUPS, no_decay=True, exclude=[Parameters(match="out")], adjust="original",
        nesterov=False, clip=0.3, adamw_lr_scale=0.5,
    ),
    "at growth": Muon(ns_precision="float32", at_growth=GROWING),
}  # fmt: skip


def main(folder: Path, optimizers: list[str], engines: list[str]) -> None:
    """All engines and optimizers, one after the other, in one process group; those on shards resumed midway, too."""
    with joined("cpu", alone=True) as world:
        found: dict[str, Tensor] = {}
        for name in optimizers:
            for kind in engines:
                there, again = folder / f"{kind}-{name}", folder / f"{kind}-{name}-resumed"
                found[f"{kind}, {name}"] = once(ENGINES[kind], OPTIMIZERS[name], there, world)
                if kind.startswith("zero"):
                    found[f"{kind}, {name}, resumed"] = resumed(ENGINES[kind], OPTIMIZERS[name], again, there, world)
        if world.rank == 0:
            torch.save(found, folder / "parameters.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(words.split("; ") for words in sys.argv[2:]))
    leave()
