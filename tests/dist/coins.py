"""A rank of test_coin_ranks.py: a run whose rows are drawn by coins; counts the rows that it really evaluates."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgrow import (
    SGD,
    RunSpec,
    Torch,
    budget,
    every,
    exponential,
    fit,
    independent_sampling,
    partition_independent_sampling,
    sqrt_lr,
)
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.sampling import SamplingSpec
from distgrow.distributed.world import World, joined
from distgrow.launch.local import leave

N = 60
ROWS = [(row, k % 3) for k, row in enumerate(torch.randn(N, 6, generator=torch.Generator().manual_seed(3)).double())]
KINDS: dict[str, SamplingSpec] = {
    "independent": independent_sampling(),
    "partition": partition_independent_sampling([20, 40]),
}


def trained(folder: Path, world: World, kind: str, *, resume: bool = False, **more: Any) -> tuple[Tensor, int]:
    """Return all parameters after the run, flat, and the rows that this rank's losses were made of."""
    torch.manual_seed(0)
    model, rows = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal rows
        outputs = model(batch[0])

        def count(gradient: Tensor) -> None:
            nonlocal rows
            rows += len(gradient)

        if outputs.requires_grad:
            outputs.register_hook(count)
        return nn.functional.cross_entropy(outputs, batch[1])

    fit(
        model, loss, ROWS, growth=exponential(2, 2, 8), stages=every(samples=60), lr=sqrt_lr(0.05),
        budget=budget(samples=240), optimizer=SGD(momentum=0.9, weight_decay=0.01), sampling=KINDS[kind],
        engine=Torch(precision="float64", max_micro=3), world=world, resume=resume,
        run=RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=4, keep=99), **more),
    )  # fmt: skip
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()]), rows


if __name__ == "__main__":
    with joined("cpu", alone=True) as ranks:
        for name in KINDS:
            place = f"{sys.argv[1]}-{name}"
            values, seen = trained(Path(place), ranks, name, resume="resume" in sys.argv)
            torch.save(values, f"{place}-{ranks.rank}.pt")
            Path(f"{place}-{ranks.rank}.json").write_text(json.dumps(seen))
    leave()
