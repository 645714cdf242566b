"""Rows drawn by coins: the same run on one and two ranks, counted by the rows that went backward, and after resumes."""

import json
import shutil
from pathlib import Path

import torch
from coins import KINDS, trained
from conftest import events, in_ranks, ledger

from distgrow.distributed.world import World


def test_runs_with_coins_are_the_same_on_two_ranks_and_after_resumes_and_count_what_was_evaluated(
    tmp_path: Path,
) -> None:
    one = {kind: trained(tmp_path / f"one-{kind}", World(), kind) for kind in KINDS}
    in_ranks("coins.py", str(tmp_path / "two"), workers=2)
    for kind, (whole, rows) in one.items():
        two = [torch.load(tmp_path / f"two-{kind}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert torch.equal(*two)
        assert float((two[0] - whole).norm() / whole.norm()) < 1e-12
        seen = [json.loads((tmp_path / f"two-{kind}-{rank}.json").read_text()) for rank in (0, 1)]
        counts = ledger(tmp_path / f"one-{kind}")
        assert ledger(tmp_path / f"two-{kind}") == counts
        assert counts["applied"] == sum(counts.values()) == rows == sum(seen)
        lines = events(tmp_path / f"one-{kind}", "step")
        drawn = [line["drawn"] for line in lines]
        assert 0 in drawn  # a mean of two or four: some updates draw nothing, and some a row for one rank alone
        assert 1 in drawn
        assert sum(drawn) == counts["applied"]
        assert [line["batch"] for line in lines] == sorted(line["batch"] for line in lines)
        assert {line["batch"] for line in lines} == {2, 4, 8}
        assert drawn == [line["drawn"] for line in events(tmp_path / f"two-{kind}", "step")]
        again(tmp_path, kind)
    in_ranks("coins.py", str(tmp_path / "two"), "resume", workers=2)
    for kind, (whole, _) in one.items():
        first = torch.load(tmp_path / f"before-{kind}.pt", weights_only=True)
        assert torch.equal(torch.load(tmp_path / f"two-{kind}-0.pt", weights_only=True), first)  # to the bit
        moved, _ = trained(tmp_path / f"moved-{kind}", World(), kind, resume=True)
        assert float((moved - whole).norm() / whole.norm()) < 1e-12
        assert {**ledger(tmp_path / f"moved-{kind}"), "replayed": 0} == ledger(tmp_path / f"one-{kind}")


def again(folder: Path, kind: str) -> None:
    """Keep the parameters, and remove the later half of the run's checkpoints, as if it had been killed."""
    shutil.copy(folder / f"two-{kind}-0.pt", folder / f"before-{kind}.pt")
    kept = sorted((folder / f"two-{kind}/checkpoints").iterdir())
    for checkpoint in kept[len(kept) // 2 :]:
        shutil.rmtree(checkpoint)
    shutil.copytree(folder / f"two-{kind}", folder / f"moved-{kind}")
