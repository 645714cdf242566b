"""Muon under ZeRO 1–3 is the same run as plain torch: parameters, ledger, norms, interruptions, refusals."""

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, events, in_ranks, ledger
from torch import Tensor

pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")

from flat_muon import ENGINES, OPTIMIZERS
from sharding import once

from distgrow.checkpoint.export import weights_of
from distgrow.config.load import load
from distgrow.core.errors import ConfigError, RunError
from distgrow.distributed.world import World
from distgrow.engine.deepspeed.shards import Shards


class Runs(NamedTuple):
    """Runs of some engines and optimizers on several ranks, and each with torch in one process."""

    folder: Path
    engines: list[str]
    found: dict[str, Tensor]  #: all parameters at the end of each
    alone: dict[str, Tensor]


def trained(folder: Path, workers: int, optimizers: list[str], engines: list[str]) -> Runs:
    in_ranks("flat_muon.py", str(folder), "; ".join(optimizers), "; ".join(engines), workers=workers)
    found = torch.load(folder / "parameters.pt", weights_only=True)
    alone = {name: once(ENGINES["torch"], OPTIMIZERS[name], folder / f"alone-{name}", World()) for name in optimizers}
    return Runs(folder, engines, found, alone)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return trained(tmp_path_factory.mktemp("few"), 2, ["groups"], ["torch", "zero 3"])


@pytest.fixture(scope="module")
def all_of_them(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return trained(tmp_path_factory.mktemp("all"), 2, list(OPTIMIZERS), list(ENGINES))


@pytest.fixture(params=["few", pytest.param("all_of_them", marks=pytest.mark.slow)])
def runs(request: pytest.FixtureRequest) -> Runs:
    return request.getfixturevalue(request.param)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / one.double().norm())


def test_muon_on_flat_shards_trains_as_one_process(runs: Runs) -> None:
    for optimizer, alone in runs.alone.items():
        for kind in runs.engines:
            assert apart(alone, runs.found[f"{kind}, {optimizer}"]) <= 1e-5, f"{kind}, {optimizer}"
            assert ledger(runs.folder / f"{kind}-{optimizer}") == ledger(runs.folder / f"alone-{optimizer}")


def test_muon_on_flat_shards_shows_the_loss_norm_noise_and_evaluations_of_ddp(runs: Runs) -> None:
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


def test_a_resumed_run_of_muon_on_flat_shards_is_the_whole_one_bit_by_bit(runs: Runs) -> None:
    resumed = [key for key in runs.found if key.endswith("resumed")]
    assert len(resumed) == len(runs.alone) * sum(kind.startswith("zero") for kind in runs.engines)
    for key in resumed:
        assert torch.equal(runs.found[key], runs.found[key.removesuffix(", resumed")]), key


def test_what_muon_has_trained_on_flat_shards_is_exported(runs: Runs) -> None:
    for optimizer in runs.alone:
        for kind in set(runs.engines) - {"torch", "fsdp"}:
            state = weights_of(runs.folder / f"{kind}-{optimizer}").state.values()
            assert torch.equal(torch.cat([value.flatten() for value in state]), runs.found[f"{kind}, {optimizer}"])


def test_a_checkpoint_of_muon_on_flat_shards_is_refused_on_another_number_of_ranks(few: Runs) -> None:
    newest = max((few.folder / "zero 3-groups/checkpoints").glob("step-*"))
    resizes = ENGINES["zero 3"].resizes(OPTIMIZERS["groups"])
    with pytest.raises(RunError, match=r"was written by 2 ranks.*go on with 2, or use .* engine.kind=fsdp"):
        Shards(SimpleNamespace(), World(), resizes=resizes).load(newest)


def test_workers_that_follow_the_stages_are_refused_with_muon_on_flat_shards() -> None:
    words = ("optimizer={kind: muon}", "engine={kind: deepspeed}", "launch={workers: {0: 1, 1: 2}}")
    with pytest.raises(ConfigError, match="give launch.workers one number, or engine.kind=torch"):
        load(ROOT / "configs/digits.yaml", words)
