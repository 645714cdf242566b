"""Every sharding of engine.kind=fsdp is the same run as plain torch: parameters, ledger, noise, interruptions."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import events, in_ranks, ledger
from sharding import ENGINES, OPTIMIZERS, RESUMED, Net, once
from torch import Tensor

from distgrow.checkpoint.export import weights_of
from distgrow.distributed.world import World


class Runs(NamedTuple):
    """Runs of some engines and optimizers on several ranks, and each with torch in one process."""

    folder: Path
    engines: list[str]
    found: dict[str, Tensor]  #: all parameters at the end of each
    alone: dict[str, Tensor]


def trained(folder: Path, workers: int, optimizers: list[str], engines: list[str]) -> Runs:
    in_ranks("sharding.py", str(folder), "; ".join(optimizers), "; ".join(engines), workers=workers)
    found = torch.load(folder / "parameters.pt", weights_only=True)
    alone = {name: once(ENGINES["torch"], OPTIMIZERS[name], folder / f"alone-{name}", World()) for name in optimizers}
    return Runs(folder, engines, found, alone)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return trained(tmp_path_factory.mktemp("few"), 2, ["adamw"], ["torch", "full"])


@pytest.fixture(scope="module")
def all_of_them(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return trained(tmp_path_factory.mktemp("all"), 4, list(OPTIMIZERS), list(ENGINES))


@pytest.fixture(params=["few", pytest.param("all_of_them", marks=pytest.mark.slow)])
def runs(request: pytest.FixtureRequest) -> Runs:
    return request.getfixturevalue(request.param)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / one.double().norm())


def test_every_sharding_trains_as_one_process(runs: Runs) -> None:
    for optimizer, alone in runs.alone.items():
        for kind in runs.engines:
            assert apart(alone, runs.found[f"{kind}, {optimizer}"]) <= 1e-5, f"{kind}, {optimizer}"
            assert ledger(runs.folder / f"{kind}-{optimizer}") == ledger(runs.folder / f"alone-{optimizer}")


def test_every_sharding_shows_the_loss_norm_noise_and_evaluations_of_ddp(runs: Runs) -> None:
    for optimizer in runs.alone:
        for kind in runs.engines:
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


def test_a_resumed_run_is_the_whole_one_bit_by_bit(runs: Runs) -> None:
    resumed = [key for key in runs.found if key.endswith("resumed")]
    assert len(resumed) == len(runs.alone) * len(set(RESUMED) & set(runs.engines))
    for key in resumed:
        assert torch.equal(runs.found[key], runs.found[key.removesuffix(", resumed")]), key


def test_what_is_exported_is_what_the_run_gives_back(runs: Runs) -> None:
    for optimizer in runs.alone:
        for kind in set(runs.engines) - {"torch"}:
            state = weights_of(runs.folder / f"{kind}-{optimizer}").state
            names = [name for name, _ in Net().named_parameters()]
            assert state.keys() == set(names)
            assert torch.equal(torch.cat([state[n].flatten() for n in names]), runs.found[f"{kind}, {optimizer}"])
            averaged = weights_of(runs.folder / f"{kind}-{optimizer}", average=True).state
            of_torch = weights_of(runs.folder / f"torch-{optimizer}", average=True).state
            assert apart(*(torch.cat([s[n].flatten() for n in names]) for s in (of_torch, averaged))) <= 1e-5
