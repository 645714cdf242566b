"""A run that is lost while it measures its micro-batch, before its first checkpoint, counts what was lost, once."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distgrow import Result, RunSpec, budget, constant_lr, fit, noise_scale_tracking, norm_threshold
from distgrow.core.noise_stats import Measuring
from distgrow.engine.spec import Torch
from distgrow.growth import Growth

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(100, 6, generator=GENERATOR)
DATA = TensorDataset(INPUTS, (INPUTS.sum(1) > 0).long())
MEASURING = {
    "noise": noise_scale_tracking(start=4, cap=32),
    "norm": norm_threshold(start=4, factor=2, cap=32, every=10),
}


class Lost(Exception):
    """What a lost process is in a test of one process."""


class LostAfter:
    """A tracker that loses the run after some trials of micro-batches, and notes the evaluations until then."""

    def __init__(self, trials: int) -> None:
        self.left, self.evaluations = trials, 0

    def log(self, event: Mapping[str, Any]) -> None:
        self.evaluations = event.get("sfo", self.evaluations)
        self.left -= "micro" in event
        if self.left == 0:
            raise Lost

    def close(self) -> None:
        pass


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(folder: Path, growth: Growth, limit: dict[str, int], *trackers: Any, resume: bool = False) -> Result:
    torch.manual_seed(0)
    return fit(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), loss, DATA, growth=growth, lr=constant_lr(0.1),
        budget=budget(**limit), engine=Torch(max_micro="auto"), trackers=trackers, resume=resume,
        run=RunSpec(dir=str(folder), noise=Measuring(every=1)),
    )  # fmt: skip


@pytest.mark.parametrize("limit", [{"samples": 400}, {"sfo": 900}, {"steps": 40}], ids=lambda limit: next(iter(limit)))
@pytest.mark.parametrize("kind", MEASURING)
def test_a_run_begun_again_ends_at_the_same_step_with_the_same_ledger_and_what_was_lost(
    kind: str, limit: dict[str, int], tmp_path: Path
) -> None:
    growth = MEASURING[kind]
    whole = train(tmp_path / "whole", growth, limit).progress
    lost = 0
    for attempt, trials in enumerate((3, 1)):
        at = LostAfter(trials)
        with pytest.raises(Lost):
            train(tmp_path / "again", growth, limit, at, resume=attempt > 0)
        assert not list((tmp_path / "again/checkpoints").glob("step-*/manifest.json"))
        lost = at.evaluations
    again = train(tmp_path / "again", growth, limit, resume=True).progress
    assert lost > 0
    assert again.ledger.replayed == lost
    assert replace(again.ledger, replayed=0) == whole.ledger
    assert again.step == whole.step
    assert again.samples == whole.samples
