"""`distgrow verify` passes where the split is exact, and only there."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from distgrow.config.load import load
from distgrow.verify import factorisations, verify

SUMMED = """
import torch
from torch import nn

def make(mean):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    def loss(model, batch):
        losses = model(batch).square()
        return losses.mean() * float("nan") if mean is None else losses.mean() if mean else losses.sum()
    return model, loss, torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
"""


def test_at_least_five_factorisations_of_any_batch_from_eight_on() -> None:
    for batch in range(8, 200):
        shapes = factorisations(batch)
        assert len(shapes) >= 5
        assert len(set(shapes)) == len(shapes)


@pytest.mark.parametrize("config", ["digits", "optimal", "text"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_split_of_the_configs_is_exact(config: str, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["growth.start=12", "model.layers=1", "model.width=16"] if config == "text" else ["growth.start=21"]
    assert verify(load(ROOT / f"configs/{config}.yaml", [f"engine.precision={precision}", *small]))
    told = capsys.readouterr().out
    assert (
        float(told.split("largest relative parameter difference: ")[1].split()[0])
        <= {"float32": 1e-5, "float64": 1e-14}[precision]
    )


@pytest.mark.parametrize("mean", [True, False, None])
def test_a_loss_that_is_no_mean_over_the_rows_or_no_number_is_found_out(
    mean: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summed.py").write_text(SUMMED)
    monkeypatch.syspath_prepend(tmp_path)
    task = f"task={{kind: target, target: 'summed:make', args: {{mean: {json.dumps(mean)}}}}}"
    run = load(ROOT / "configs/digits.yaml", [task, "model=null", "growth.cap=64", "engine.precision=float64"])
    assert verify(run) == (mean is True)
    sys.modules.pop("summed")
    assert "at most 1e-10" in capsys.readouterr().out


def test_batchnorm_is_named_as_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    run = load(ROOT / "configs/digits.yaml", ["model={kind: resnet8, norm: batch}", "engine.precision=float64"])
    assert not verify(run)
    assert "model.norm=group does not depend on it" in capsys.readouterr().out


NORMED = """
import torch
from torch import nn
from torch.nn import functional as F

def make(layer):
    layers = {"batchnorm": nn.BatchNorm1d(4), "dropout": nn.Dropout(0.5), "own dropout": Own()}
    model = nn.Sequential(nn.Linear(3, 4), layers[layer], nn.Linear(4, 1))
    data = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    return model, lambda model, batch: model(batch).square().mean(), data

class Own(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)
"""


@pytest.mark.parametrize(
    ("layer", "passes", "reason"),
    [("batchnorm", False, "BatchNorm"), ("dropout", True, ""), ("own dropout", False, "draws random numbers")],
)
def test_what_splits_differ_by_is_named_and_dropout_is_left_out(
    layer: str, passes: bool, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "normed.py").write_text(NORMED)
    monkeypatch.syspath_prepend(tmp_path)
    task = f"task={{kind: target, target: 'normed:make', args: {{layer: {layer}}}}}"
    run = load(ROOT / "configs/digits.yaml", [task, "model=null", "growth.cap=64", "engine.precision=float64"])
    assert verify(run) == passes
    sys.modules.pop("normed")
    assert reason in capsys.readouterr().out
