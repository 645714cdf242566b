"""The test set is evaluated by epochs, samples or steps, also in runs far shorter than an epoch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distgrow
from distgrow import RunSpec
from distgrow.core.errors import ConfigError
from distgrow.tracking.events import Evaluation as Evaluated
from distgrow.tracking.read import read_events
from distgrow.training.spec import Evaluation


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).pow(2).mean()


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (Evaluation(), [25]),  # a quarter of an epoch: at the end alone
        (Evaluation(every_steps=7), [7, 14, 21, 25]),
        (Evaluation(every_samples=40), [10, 20, 25]),
        (Evaluation(every_samples=42), [11, 21, 25]),  # 44 and 84 are the first beyond 42 and 84
        (Evaluation(every_epochs=0.1), [10, 20, 25]),
        (Evaluation(every_steps=25), [25]),  # once, though due twice
    ],
)
def test_evaluations_come_at_the_first_update_at_or_beyond_each_multiple(
    every: Evaluation, steps: list[int], tmp_path: Path
) -> None:
    distgrow.fit(
        nn.Linear(3, 1),
        loss,
        torch.randn(400, 3),
        test=torch.randn(10, 3),
        metrics=lambda model, batch: {"loss": loss(model, batch)},
        growth=distgrow.constant(4),
        budget=distgrow.budget(samples=100),
        lr=distgrow.constant_lr(0.01),
        run=RunSpec(dir=str(tmp_path / "run"), eval=every),
    )
    events = read_events(tmp_path / "run/metrics.jsonl")
    assert [event.step for event in events if isinstance(event, Evaluated)] == steps


def test_two_intervals_at_once_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="every_samples and every_steps"):
        Evaluation(every_samples=5, every_steps=5)
