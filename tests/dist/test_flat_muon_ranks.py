"""Muon under ZeRO 1–3 is the same run as plain torch: parameters, ledger, norms, interruptions, refusals."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")

from flat_muon import ENGINES, OPTIMIZERS
from side_by_side import Runs, check_ends, check_lines, check_resumed, trained

from distgrow.checkpoint.export import weights_of
from distgrow.config.load import load
from distgrow.core.errors import ConfigError, RunError
from distgrow.distributed.world import World
from distgrow.engine.deepspeed.shards import Shards


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    groups = {"groups": OPTIMIZERS["groups"]}
    return trained("flat_muon.py", tmp_path_factory.mktemp("few"), 2, groups, ["torch", "zero 3"])


@pytest.fixture(scope="module")
def all_of_them(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return trained("flat_muon.py", tmp_path_factory.mktemp("all"), 2, OPTIMIZERS, list(ENGINES))


@pytest.fixture(params=["few", pytest.param("all_of_them", marks=pytest.mark.slow)])
def runs(request: pytest.FixtureRequest) -> Runs:
    return request.getfixturevalue(request.param)


def test_muon_on_flat_shards_trains_as_one_process(runs: Runs) -> None:
    check_ends(runs)


def test_muon_on_flat_shards_shows_the_loss_norm_noise_and_evaluations_of_ddp(runs: Runs) -> None:
    check_lines(runs)


def test_a_resumed_run_of_muon_on_flat_shards_is_the_whole_one_bit_by_bit(runs: Runs) -> None:
    check_resumed(runs, len(runs.alone) * sum(kind.startswith("zero") for kind in runs.engines))


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
