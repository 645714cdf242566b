"""A run that is pruned is the same on any number of ranks, under ZeRO 1, and stopped or not; masks are equal there."""

from pathlib import Path

import pytest
import torch
from pruned import ENGINES, fitted

from distgrow.distributed.world import World

pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")

from conftest import events, in_ranks, ledger


def test_ranks_engines_and_resumes_prune_the_same_weights(tmp_path: Path) -> None:
    in_ranks("pruned.py", str(tmp_path), workers=2)
    found = torch.load(tmp_path / "parameters.pt", weights_only=True)
    for case, runs in found.items():
        engine, optimizer = case.split(", ")
        folder = tmp_path / f"one-{engine}-{optimizer}"
        one = fitted(("float64", optimizer), folder, World())
        zeros = {name: value == 0 for name, value in one.items()}
        assert sum(int(zeros[name].sum()) for name in ("0.weight", "2.weight")) == 90 - 18
        assert not zeros["4.weight"].any()
        for name, value in runs["whole"].items():
            assert torch.equal(value == 0, zeros[name]), f"{case}: {name}"
            assert torch.allclose(value, one[name], rtol=0, atol=1e-10 if engine == "float64" else 1e-4), (
                f"{case}: {name}"
            )
            assert torch.equal(value, runs["resumed"][name]), f"{case}: {name}"
        other = tmp_path / f"{engine}-{optimizer}"
        lines = [[line.get("compute") for line in events(run, "step")][-1] for run in (folder, other)]
        assert lines[0] == lines[1]
        assert ledger(other)["applied"] == ledger(folder)["applied"]
    assert len(ENGINES) == 2
