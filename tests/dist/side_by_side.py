"""Runs of some engines and optimizers on several ranks, held against each other and against one process."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import events, in_ranks, ledger
from sharding import ENGINES, once
from torch import Tensor

from distgrow.distributed.world import World
from distgrow.optim import OptimizerSpec


class Runs(NamedTuple):
    """Runs of some engines and optimizers on several ranks, and each with torch in one process."""

    folder: Path
    engines: list[str]
    found: dict[str, Tensor]  #: all parameters at the end of each
    alone: dict[str, Tensor]


def trained(
    script: str, folder: Path, workers: int, optimizers: Mapping[str, OptimizerSpec], engines: list[str]
) -> Runs:
    """Run a script of ranks, which leaves all parameters in a file, and each optimizer in one process beside it."""
    in_ranks(script, str(folder), "; ".join(optimizers), "; ".join(engines), workers=workers)
    found = torch.load(folder / "parameters.pt", weights_only=True)
    alone = {name: once(ENGINES["torch"], spec, folder / f"alone-{name}", World()) for name, spec in optimizers.items()}
    return Runs(folder, engines, found, alone)


def apart(one: Tensor, other: Tensor) -> float:
    """Return how far two flat states differ, relative to the first."""
    return float((one.double() - other.double()).norm() / one.double().norm())


def check_ends(runs: Runs) -> None:
    """Hold parameters and ledgers against those of one process."""
    for optimizer, alone in runs.alone.items():
        for kind in runs.engines:
            assert apart(alone, runs.found[f"{kind}, {optimizer}"]) <= 1e-5, f"{kind}, {optimizer}"
            assert ledger(runs.folder / f"{kind}-{optimizer}") == ledger(runs.folder / f"alone-{optimizer}")


def check_lines(runs: Runs) -> None:
    """Hold what updates and evaluations gave against what they gave by DDP."""
    for optimizer in runs.alone:
        for kind in set(runs.engines) - {"torch"}:
            steps = [events(runs.folder / f"{name}-{optimizer}", "step") for name in ("torch", kind)]
            assert len(steps[0]) == 20
            for one, other in zip(*steps, strict=True):
                exact = ("step", "samples", "stage", "batch", "micro", "accum", "lr", "sfo")
                assert [one[key] for key in exact] == [other[key] for key in exact]
                for key in ("loss", "grad_norm", "noise_trace"):
                    assert other[key] == pytest.approx(one[key], rel=1e-4), f"{kind}, {optimizer}, {key}"
            evaluated = [events(runs.folder / f"{name}-{optimizer}", "eval")[-1] for name in ("torch", kind)]
            for key in ("loss", "average/loss"):
                assert evaluated[1][key] == pytest.approx(evaluated[0][key], rel=1e-5), f"{kind}, {optimizer}"
            assert evaluated[1]["average/loss"] != evaluated[1]["loss"]


def check_resumed(runs: Runs, number: int) -> None:
    """Hold `number` resumed runs against whole ones, bit by bit."""
    resumed = [key for key in runs.found if key.endswith("resumed")]
    assert len(resumed) == number
    for key in resumed:
        assert torch.equal(runs.found[key], runs.found[key.removesuffix(", resumed")]), key
