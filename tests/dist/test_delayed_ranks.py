"""Gradients that are applied late: the same run on one and two ranks, and after a resume on another number of ranks."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import Commands, events, in_ranks, ledger, parameters
from late import DELAY, trained

from distgrow.distributed.world import World


def last_removed(folder: Path) -> None:
    """Remove the later half of a run's checkpoints, as if it had been killed; the rest has gradients in flight."""
    kept = sorted((folder / "checkpoints").iterdir())
    middle = len(kept) // 2
    for checkpoint in kept[middle:]:
        shutil.rmtree(checkpoint)
    state = torch.load(kept[middle - 1] / "engine.pt", weights_only=True)
    assert len(state["delayed"]) == DELAY


def test_a_delayed_run_is_the_same_on_two_ranks_and_after_resumes_on_as_many_and_on_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    whole = trained(one, World())
    in_ranks("late.py", str(two), workers=2)
    ranks = [torch.load(f"{two}-{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(ranks[0], ranks[1])
    assert float((ranks[0] - whole).norm() / whole.norm()) < 1e-12
    assert ledger(two) == ledger(one)
    assert ledger(two)["applied"] == 500
    last_removed(two)
    shutil.copytree(two, moved := tmp_path / "moved")
    in_ranks("late.py", str(two), "resume", workers=2)
    assert torch.equal(torch.load(f"{two}-0.pt", weights_only=True), ranks[0])  # to the bit
    assert float((trained(moved, World(), resume=True) - whole).norm() / whole.norm()) < 1e-12
    assert {**ledger(moved), "replayed": 0} == ledger(one)


@pytest.mark.fault
def test_gradients_in_flight_go_over_to_the_workers_of_the_next_stage(distgrow: Commands) -> None:
    late = ("engine={precision: float64, max_micro: 8, delay: 3}", "budget={samples: 1500}", "lr.base=0.02")
    assert distgrow.train("fixed", *late).code == 0
    assert distgrow.train("grown", *late, "launch.workers=[1, 4]").code == 0
    fixed, grown = distgrow.folder / "fixed", distgrow.folder / "grown"
    assert [(event["old"], event["new"]) for event in events(grown, "resize")] == [(1, 2), (2, 4)]
    assert (parameters(fixed) - parameters(grown)).norm() <= 1e-10 * parameters(fixed).norm()
    assert ledger(grown) == ledger(fixed)
    assert ledger(grown)["applied"] == 1500
