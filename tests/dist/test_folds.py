"""Several runs in one script on several ranks."""

from pathlib import Path

import pytest
import torch
from conftest import in_ranks


@pytest.mark.parametrize("whose", ["fit", "script"])
def test_several_runs_share_a_script_on_two_ranks_and_end_alike(whose: str, tmp_path: Path) -> None:
    in_ranks("folds.py", str(tmp_path), whose, workers=2)
    ends = [torch.load(file, weights_only=True) for file in sorted(tmp_path.glob("*.pt"))]
    assert len(ends) >= 3
    assert all(torch.equal(ends[0], end) for end in ends)
