"""Models of uncommon make end on two ranks as in one process."""

from pathlib import Path

import pytest
import torch
from conftest import in_ranks
from layouts import trained

from distgrow.distributed.world import World


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    in_ranks("layouts.py", str(folder), "complex", "find_unused", workers=2)
    return folder


@pytest.mark.parametrize("case", ["complex", "find_unused"])
def test_two_ranks_end_with_the_parameters_of_one_process(case: str, two_ranks: Path, tmp_path: Path) -> None:
    together = torch.load(two_ranks / f"{case}.pt", weights_only=True)
    for one, other in zip(trained(case, tmp_path / "alone", World()).parameters(), together, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.detach(), other, rtol=1e-10, atol=1e-12)
