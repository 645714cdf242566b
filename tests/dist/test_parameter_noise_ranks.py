"""Noise of each parameter: two ranks find what one finds of the same parts."""

from pathlib import Path

import torch
from by_parameter import figures
from conftest import in_ranks

from distgrow.distributed.world import World


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    in_ranks("by_parameter.py", str(tmp_path / "noise"), workers=2)
    ranks = [torch.load(tmp_path / f"noise-{rank}.pt", weights_only=True) for rank in range(2)]
    alone = figures(World())
    assert torch.equal(ranks[0], ranks[1])
    assert alone.isfinite().all()
    assert torch.allclose(ranks[0], alone, rtol=1e-9)
