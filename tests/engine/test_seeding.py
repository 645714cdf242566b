"""Random numbers of a user's code follow from the run's seed, whichever of the usual generators they are drawn from."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import parameters
from torch import Tensor, nn
from torch.nn import functional as F

from distgrow import RunSpec, budget, constant_lr, exponential, fit
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.probe_schedule import Probing
from distgrow.data.datasets import Arrays
from distgrow.data.seeding import kept_generators, seed_generators

DRAWS: dict[str, Any] = {
    "python": random.random,
    "numpy": lambda: float(np.random.rand()),
    "torch": lambda: float(torch.rand(())),
}


def data() -> Arrays:
    draw = torch.Generator().manual_seed(0)
    return Arrays(torch.randn(60, 5, generator=draw), torch.randint(3, (60,), generator=draw))


class Scaled(nn.Module):
    """A model that draws a number at each forward."""

    def __init__(self, generator: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.generator = nn.Linear(5, 3), generator

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) * DRAWS[self.generator]()


def trained(folder: Path, generator: str, *, seed: int = 5, resume: bool = False) -> Tensor:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0] + 0.1 * DRAWS[generator]()), batch[1])

    run = RunSpec(
        dir=str(folder), seed=seed, checkpoint=Checkpointing(every_steps=4, keep=100), probe=Probing(every_epochs=0.5)
    )
    fit(
        Scaled(generator), loss, data(), test=data(), growth=exponential(4, 2, 16), lr=constant_lr(0.1),
        budget=budget(epochs=2), run=run, resume=resume,
    )  # fmt: skip
    return parameters(folder)


@pytest.mark.parametrize("generator", DRAWS)
def test_runs_of_one_seed_and_resumed_ones_are_equal_to_the_last_bit(generator: str, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", generator)
    assert torch.equal(whole, trained(tmp_path / "again", generator))
    assert not torch.equal(whole, trained(tmp_path / "other", generator, seed=6))
    probes = [line for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines() if '"probe"' in line]
    first, *later = sorted((tmp_path / "again/checkpoints").iterdir())
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    assert torch.equal(whole, trained(tmp_path / "again", generator, resume=True))
    lines = (tmp_path / "again/metrics.jsonl").read_text().splitlines()
    norms = [line.split('"norm": ')[1].split(",")[0] for line in lines if '"norm": ' in line]
    assert norms[-1] == probes[-1].split('"norm": ')[1].split(",")[0]
    assert first.exists()


@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
def test_a_seed_decides_what_is_drawn_and_the_states_before_come_back(draw: Any) -> None:
    seed_generators(2**62 + 7)
    first, second = draw(), draw()
    seed_generators(2**62 + 7)
    assert draw() == first
    with kept_generators():
        seed_generators(3)
        draw()
    assert draw() == second
