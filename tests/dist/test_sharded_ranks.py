"""Every sharding of engine.kind=fsdp is the same run as plain torch: parameters, ledger, noise, interruptions."""

import pytest
import torch
from sharding import ENGINES, OPTIMIZERS, RESUMED, Net
from side_by_side import Runs, apart, check_ends, check_lines, check_resumed, trained

from distgrow.checkpoint.export import weights_of


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return trained("sharding.py", tmp_path_factory.mktemp("few"), 2, {"adamw": OPTIMIZERS["adamw"]}, ["torch", "full"])


@pytest.fixture(scope="module")
def all_of_them(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return trained("sharding.py", tmp_path_factory.mktemp("all"), 4, OPTIMIZERS, list(ENGINES))


@pytest.fixture(params=["few", pytest.param("all_of_them", marks=pytest.mark.slow)])
def runs(request: pytest.FixtureRequest) -> Runs:
    return request.getfixturevalue(request.param)


def test_every_sharding_trains_as_one_process(runs: Runs) -> None:
    check_ends(runs)


def test_every_sharding_shows_the_loss_norm_noise_and_evaluations_of_ddp(runs: Runs) -> None:
    check_lines(runs)


def test_a_resumed_run_is_the_whole_one_bit_by_bit(runs: Runs) -> None:
    check_resumed(runs, len(runs.alone) * len(set(RESUMED) & set(runs.engines)))


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
