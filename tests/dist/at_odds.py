"""A rank of test_worlds.py: a second update that ranks are at odds about; every rank writes what it is told."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from measured import ENGINES, loss, network, plans, rows
from torch import Tensor, nn

from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.core.plan import Plan
from distgrow.distributed.environment import place
from distgrow.distributed.world import World, joined
from distgrow.engine.noise.hooks import MicroBatchNorms
from distgrow.launch.local import leave
from distgrow.optim.sgd import SGD


class Fickle(nn.Module):
    """A network that leaves a layer out from its second update on."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.once, self.forwards = network(), nn.Linear(10, 10), 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.always(x) if self.forwards > 3 else self.once(self.always(x))


def odd(plan: Plan, how: str) -> Plan:
    """The plan of the rank that is mistaken."""
    if how == "batch":
        return replace(plan, batch=plan.batch + 6, micro=plan.micro + 1)
    return replace(plan, lr=0.05) if how == "lr" else plan


def without_memory() -> None:
    """The last rank runs out of memory once all its gradients have been sent."""

    def fail(self: MicroBatchNorms) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    MicroBatchNorms.total = fail


def second(world: World, engine: str, how: str) -> str:
    """What a rank is told of the second update."""
    model = Fickle() if how == "layer" else network()
    made = ENGINES[engine].build(model, loss, metrics=None, optimizer=SGD(), world=world)
    plan, *_ = plans(world.size)
    plan = replace(plan, product=False)
    made.update(plan, rows(plan, world.rank))
    before = [parameter.clone() for parameter in model.parameters()]
    last = world.rank == world.size - 1
    if how == "memory" and last:
        without_memory()
    own = odd(plan, how) if last else plan
    try:
        outcome = made.update(own, rows(own, world.rank))
    except (TrainingFailed, ConfigError) as error:
        return str(error)
    same = all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    return f"applied {outcome.applied}, out of memory {outcome.out_of_memory}, as before {same}"


def main(folder: Path, *words: str) -> None:
    """The second update, or the means of ranks with unlike numbers of threads."""
    if words[0] == "unlike":
        torch.set_num_threads(1 + place()[0])
    with joined("cpu") as world:
        means = f"{world.same_hardware} {world.mean_async([world.rank, 1.0])()}"
        told = means if words[0] == "unlike" else second(world, *words)
        (folder / f"told.{world.rank}").write_text(told)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    leave()
