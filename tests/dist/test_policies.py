"""Growth that cannot work ends before it begins: exit code 2, one message, nothing written."""

import pytest
from conftest import ROOT, Commands

SUMMED = """
import torch
from torch import nn
from torch.nn import functional as F
from distgrow import Task

def task():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    loss = lambda model, batch: F.mse_loss(model(batch[0]), batch[0][:, :1], reduction="sum")
    return Task(model=nn.Linear(5, 1), loss=loss, train=torch.utils.data.TensorDataset(x))
"""
TASK = ("task={kind: target, target: 'summed:task'}", "model=null")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_that_is_a_sum_is_told_before_growth_measures_it(distgrow: Commands, workers: int) -> None:
    (distgrow.folder / "summed.py").write_text(SUMMED)
    growth = ("growth={kind: gns, start: 8, cap: 32}", "stages={}")
    ended = distgrow.train("runs/sum", *TASK, *growth, f"launch.workers={workers}")
    assert ended.code == 2
    assert ended.err.count("the loss is no mean over samples") == 1
    assert "Traceback" not in ended.err
    assert not (distgrow.folder / "runs/sum/config.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("growth={kind: adaptive, epsilon: 0, cap: 64}",), "growth.epsilon=0: must be greater than 0"),
        (("growth={kind: adaptive, cap: 64, start: 1, norm: estimated}",), "raise growth.start to at least 2"),
        (("growth={kind: cabs, cap: 64}", "optimizer.momentum=0.9"), "holds for SGD without momentum"),
        (("growth={kind: gns, cap: 4096}",), "exceeds the 1437 samples of the training set"),
        (("growth={kind: late, cap: 64}", "stages={every: {epochs: 1}}"), "sets its own stage lengths: remove stages"),
    ],
)
def test_growth_that_cannot_work_is_a_bad_config(distgrow: Commands, overrides: tuple[str, ...], told: str) -> None:
    words = ["plan", str(ROOT / "configs/digits.yaml"), "stages={}", "lr={base: 0.1}", "budget={epochs: 40}"]
    ended = distgrow(*words, *overrides)
    assert (ended.code, told in ended.err, "Traceback" in ended.err) == (2, True, False)
