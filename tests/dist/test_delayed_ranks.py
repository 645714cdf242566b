"""Gradients that are applied late: the same run on one and two ranks, and after a resume on another number of ranks."""

import shutil
from pathlib import Path

import torch
from conftest import in_ranks, ledger
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
