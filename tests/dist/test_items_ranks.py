"""A mean over items is exact on any number of ranks and by every engine, with micro-batches that have none."""

from pathlib import Path

import pytest
import torch
from itemised import BATCH, ENGINES, OPTIMIZERS, engines, trained

from distgrow.distributed.world import World

pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")

from conftest import events, in_ranks, ledger


def test_ranks_and_engines_make_the_update_of_one_pass_over_the_batch(tmp_path: Path) -> None:
    in_ranks("itemised.py", str(tmp_path), workers=2)
    found = torch.load(tmp_path / "parameters.pt", weights_only=True)
    for name, optimizer in OPTIMIZERS.items():
        folder = tmp_path / f"one-{name}"
        whole = not optimizer.goes_by_parts  # those steps differ with the parts, but not with the ranks that have them
        one = trained(ENGINES["float64"], optimizer, folder, World(), whole=whole)
        assert 0 < ledger(folder)["skipped"] < 7 * BATCH
        losses = [event["loss"] for event in events(folder, "step")]
        for engine in engines(optimizer):
            other = tmp_path / f"{engine}-{name}"
            rounding = 1e-12 if engine == "float64" else 2e-2 if "bfloat16" in engine else 2e-6
            apart = float((found[f"{engine}, {name}"] - one).norm() / one.norm())
            assert apart < rounding, f"{engine}, {name}: {apart}"
            assert [event["loss"] for event in events(other, "step")] == pytest.approx(losses, rel=10 * rounding)
            evaluated = [[event["loss"] for event in events(run, "eval")] for run in (folder, other)]
            assert evaluated[1] == pytest.approx(evaluated[0], rel=10 * rounding)
            assert ledger(other) == ledger(folder)
