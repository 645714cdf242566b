"""A rank of test_hooked_ranks.py: hooks of one rank that ask for the end, and that raise."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distgrow import ConfigError, EndRun, Hook, KeepBest, RunSpec, budget, exponential, fit
from distgrow.data.datasets import digits
from distgrow.distributed.world import World, joined
from distgrow.launch.local import leave
from distgrow.training.spec import Evaluation


class Odd(Hook):
    """What rank 1 alone does."""

    def __init__(self, rank: int, method: str) -> None:
        self.seen, mine = 0, rank == 1
        setattr(self, method, lambda value: self.act(value) if mine else None)

    def act(self, value: Any) -> EndRun | None:
        """Ask for the end at step 4."""
        return EndRun("rank 1 has seen enough") if value.step >= 4 else None


class Fails(Odd):
    """Raise in place of an answer."""

    def act(self, value: Any) -> None:
        raise RuntimeError("only rank 1 fails")


def once(folder: Path, world: World, hook: Hook) -> tuple[int, str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    train, test = digits()
    result = fit(
        model, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), train, test=test,
        growth=exponential(8, 2, 32), budget=budget(steps=12), world=world, hooks=[KeepBest(), hook],
        run=RunSpec(dir=str(folder), eval=Evaluation(every_steps=3)),
    )  # fmt: skip
    return result.progress.step, result.reason


def main(folder: Path) -> None:
    """Every rank checks what it met; the first one also that all met the same."""
    with joined("cpu") as world:
        for method, last in (("after_update", 5), ("after_eval", 6)):
            found = once(folder / method, world, Odd(world.rank, method))
            assert found == (last, "rank 1 has seen enough"), found
            assert len(set(world.gather(found))) == 1
        for method in ("begin", "after_eval", "before_checkpoint", "end"):
            told = ""
            try:
                once(folder / f"{method} fails", world, Fails(world.rank, method))
            except ConfigError as error:
                told = str(error)
            assert f"Fails.{method} raised RuntimeError: only rank 1 fails" in told, (world.rank, told)


main(Path(sys.argv[1]))
leave()
