"""Gradients at shifted points: the same run on one and two ranks, and after a resume on another number of ranks."""

import shutil
from pathlib import Path

import torch
from conftest import in_ranks, ledger
from shifting import KINDS, trained

from distgrow.distributed.world import World


def last_removed(folder: Path) -> None:
    """Remove the later half of a run's checkpoints, as if it had been killed."""
    kept = sorted((folder / "checkpoints").iterdir())
    for checkpoint in kept[len(kept) // 2 :]:
        shutil.rmtree(checkpoint)


def test_runs_with_shifts_are_the_same_on_two_ranks_and_after_resumes_on_as_many_and_on_one(tmp_path: Path) -> None:
    one = {kind: trained(tmp_path / f"one-{kind}", World(), kind) for kind in KINDS}
    in_ranks("shifting.py", str(tmp_path / "two"), workers=2)
    two = {
        kind: [torch.load(tmp_path / f"two-{kind}-{rank}.pt", weights_only=True) for rank in (0, 1)] for kind in KINDS
    }
    for kind, whole in one.items():
        assert torch.equal(*two[kind]), kind
        assert float((two[kind][0] - whole).norm() / whole.norm()) < 1e-12, kind
        expected = {"applied": 320, **({"extrapolated": 320} if "fresh" in kind else {})}
        assert {name: count for name, count in ledger(tmp_path / f"two-{kind}").items() if count} == expected
        last_removed(tmp_path / f"two-{kind}")
        shutil.copytree(tmp_path / f"two-{kind}", tmp_path / f"moved-{kind}")
    in_ranks("shifting.py", str(tmp_path / "two"), "resume", workers=2)
    for kind, whole in one.items():
        again = torch.load(tmp_path / f"two-{kind}-0.pt", weights_only=True)
        assert torch.equal(again, two[kind][0]), kind  # to the bit
        moved = trained(tmp_path / f"moved-{kind}", World(), kind, resume=True)
        assert float((moved - whole).norm() / whole.norm()) < 1e-12, kind
        assert {**ledger(tmp_path / f"moved-{kind}"), "replayed": 0} == ledger(tmp_path / f"one-{kind}")
