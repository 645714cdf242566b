"""Experts whose number rises: the same run on one and two ranks, in other micro-batches, and after resumes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import events, in_ranks, ledger, parameters
from routed import SAMPLES, trained

TIMED = {"time_s", "samples_per_s", "seconds", "sfo", "sfo_replayed"}


def told(run: Path) -> list[dict[str, Any]]:
    """Return updates, evaluations and probes without what is a matter of time; of repeated ones the last."""
    lines = {(line["event"], line["samples"]): line for kind in ("step", "eval", "probe") for line in events(run, kind)}
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines.values()]


def last_removed(run: Path) -> None:
    """Remove the later half of a run's checkpoints, as if it had been killed."""
    kept = sorted((run / "checkpoints").iterdir())
    for checkpoint in kept[len(kept) // 2 :]:
        shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    trained(run)
    return run


def test_the_number_rises_along_the_samples_and_is_in_every_line(whole: Path) -> None:
    lines = events(whole, "step")
    before = [0, *(line["samples"] for line in lines)]
    assert [line["active"] for line in lines] == [1 + 4 * samples // SAMPLES for samples in before[:-1]]
    assert {line["active"] for line in lines} == {1, 2, 3, 4}


def test_two_ranks_and_other_micro_batches_make_the_same_run(whole: Path, tmp_path: Path) -> None:
    other, two = tmp_path / "other", tmp_path / "two"
    trained(other, max_micro=24)
    in_ranks("routed.py", str(two), workers=2)
    for run in (other, two):
        assert (parameters(run) - parameters(whole)).norm() <= 1e-10 * parameters(whole).norm()
        assert ledger(run) == ledger(whole)
        for line, wanted in zip(told(run), told(whole), strict=True):
            assert line.get("active") == wanted.get("active")
            assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-8)


def test_a_resumed_run_is_the_one_that_never_stopped_to_the_bit(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, again := tmp_path / "run")
    last_removed(again)
    trained(again, resume=True)
    assert torch.equal(parameters(again), parameters(whole))
    assert told(again) == told(whole)
    assert {**ledger(again), "replayed": 0} == ledger(whole)


def test_two_ranks_go_on_where_one_stopped(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, again := tmp_path / "run")
    last_removed(again)
    in_ranks("routed.py", str(again), "resume", workers=2)
    assert (parameters(again) - parameters(whole)).norm() <= 1e-10 * parameters(whole).norm()
    assert {**ledger(again), "replayed": 0} == ledger(whole)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero=1", "zero=2", "zero=3", "fsdp"])
def test_two_sharded_ranks_make_the_run_of_plain_torch(engine: str, tmp_path: Path) -> None:
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    trained(plain, precision="float32")
    in_ranks("routed.py", str(sharded), engine, workers=2)
    for line, wanted in zip(told(sharded), told(plain), strict=True):
        assert line.get("active") == wanted.get("active")
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
