"""A rank of test_worlds.py: ranks that do not decide alike; every rank writes what it is told."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from measured import ENGINES, loss, network, plans, rows

from distgrow.engine import SGD
from distgrow.launcher import leave, place
from distgrow.plan import Plan
from distgrow.run import TrainingFailed
from distgrow.world import joined


def odd(plan: Plan, how: str) -> Plan:
    """The plan of the rank that is mistaken."""
    return replace(plan, batch=plan.batch + 6, micro=plan.micro + 1) if how == "batch" else replace(plan, lr=0.05)


def main(folder: Path, engine: str, how: str) -> None:
    """One update as all have planned it, then one that the last rank has planned otherwise."""
    with joined("cpu") as world:
        assert world.alike
        made = ENGINES[engine].build(network(), loss, metrics=None, optimizer=SGD(), world=world)
        plan, *_ = plans(world.size)
        made.update(plan, rows(plan, world.rank))
        own = odd(plan, how) if world.rank == world.size - 1 else plan
        try:
            made.update(own, rows(own, world.rank))
        except TrainingFailed as error:
            (folder / f"told.{world.rank}").write_text(str(error))


def unlike(folder: Path) -> None:
    """Ranks with unlike numbers of threads."""
    rank, *_ = place()
    torch.set_num_threads(1 + rank)
    with joined("cpu") as world:
        means = world.meaning([rank, 1.0])()
        (folder / f"told.{world.rank}").write_text(f"{world.alike} {means}")


if __name__ == "__main__":
    if sys.argv[2] == "unlike":
        unlike(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), *sys.argv[2:])
    leave()
