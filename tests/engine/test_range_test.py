"""range-test finds a limit of stability that is known in closed form, charges what it took and leaves no run behind."""

import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distgrow.config.load import parse
from distgrow.config.run import Run
from distgrow.core.errors import ConfigError
from distgrow.core.rate_test import MOST_POWER as MOST
from distgrow.critical_batch.proposal import Wish
from distgrow.critical_batch.range_test import range_test, sentences
from distgrow.training.rate_test import RateResult, RateResults, next_power

#: f(θ) = ½·4·θ² for every sample, from θ = 1: plain SGD is stable below η = 2/4.
CODE = """
import torch
from torch import nn
from distgrow import Task

class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(1))
    def forward(self, x):
        return self.theta

def task():
    def loss(model, batch):
        return 2.0 * (model(batch[0]) ** 2).mean()
    return Task(model=Point(), loss=loss, train=[(torch.zeros(1),) for _ in range(4000)])
"""


def results(*losses: float, first: float = 2.0, updates: int = 200) -> RateResults:
    """Short runs with these last losses, from the rate 0.1 on."""
    start, *tried = (
        RateResult(lr=lr, loss=loss, evaluations=1, seconds=0.0)
        for lr, loss in zip([0.0, *(0.1 * 2**k for k in range(len(losses)))], [first, *losses], strict=True)
    )
    return RateResults(first=start, tried=tuple(tried), updates=updates)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    (tmp_path / "one_point.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return parse(
        {
            "task": {"kind": "target", "target": "one_point:task"},
            "growth": {"kind": "exponential", "start": 8, "cap": 64},
            "lr": {"base": 0.1},
            "budget": {"epochs": 1},
            "run": {"dir": str(tmp_path / "runs/one")},
        }
    )


@given(st.integers(-MOST - 3, MOST + 3))
def test_the_search_ends_at_the_edge_wherever_it_is(edge: int) -> None:
    """Runs up to `edge` are stable."""
    tried = dict[int, bool]()
    while (power := next_power(tried)) is not None:
        assert power not in tried
        tried[power] = power <= edge
    kept = [power for power in tried if tried[power]]
    assert max(kept, default=None) == (None if edge < -MOST else min(edge, MOST))
    assert len(tried) == min(abs(edge) + 1 + (0 <= edge < MOST), MOST + 1)


def test_the_limit_and_the_proposal_are_those_of_the_closed_form(run: Run, tmp_path: Path) -> None:
    range_test(run, updates=20)
    found = json.loads((tmp_path / "runs/range-test-one.json").read_text())
    assert found["largest_stable_lr"] == pytest.approx(0.4)  # 0.8 is above 2/4
    assert found["proposed_lr"] == pytest.approx(0.4 / 8)  # as 20 updates are few; |1 − 4η| is least at 0.2
    assert [each["lr"] for each in found["runs"]] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    for each in found["runs"]:  # the mean loss of the last five updates, each before its update
        fall = (1 - 4 * each["lr"]) ** 2
        assert each["loss"] == pytest.approx(sum(2 * fall**k for k in range(15, 20)) / 5, rel=1e-4)
    assert found["first_loss"] == 2.0
    assert found["evaluations"] == 64 + 4 * 20 * 8


def test_from_above_it_goes_down_to_the_limit(run: Run, tmp_path: Path) -> None:
    range_test(run.model_copy(update={"lr": run.lr.model_copy(update={"base": 3.2})}), 20, str(tmp_path / "out"))
    found = json.loads((tmp_path / "out/range-test-one.json").read_text())
    assert found["largest_stable_lr"] == pytest.approx(0.4)
    assert len(found["runs"]) == 4


def test_a_proposal_is_written_and_saved_and_can_be_trained(run: Run, tmp_path: Path) -> None:
    """The largest rate at b₀ = 8 is 0.4. An eighth of it is proposed, half of it is b₀'s limit: four times b₀, so."""
    range_test(run, 20, None, Wish(steps=140), str(tmp_path / "found.yaml"))
    saved = yaml.safe_load((tmp_path / "found.yaml").read_text())
    assert json.loads((tmp_path / "runs/range-test-one.json").read_text())["proposal"] == saved
    assert saved["growth"]["start"] <= 32
    assert saved["lr"]["base"] == pytest.approx(0.05 * saved["growth"]["start"] / 8)
    assert parse({**run.model_dump(mode="json"), **saved}).fit().progress.step == pytest.approx(140, rel=0.02)


def test_no_run_is_left_behind(run: Run, tmp_path: Path) -> None:
    range_test(run, updates=20)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"range-test-one.json", "range-test-one.png"}
    assert run.fit().finished  # its folder is still free


@pytest.mark.parametrize(
    ("changed", "updates", "told"),
    [
        ({}, 5, "--updates=5"),
        ({"growth": {"kind": "constant", "start": 9000}}, 20, "training set"),
    ],
)
def test_what_cannot_be_tried_is_refused(run: Run, changed: dict[str, object], updates: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        range_test(parse({**run.model_dump(mode="json"), **changed}), updates)


# ── what follows from runs ──────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_ends_above_the_loss_of_the_first_weights_is_unstable() -> None:
    found = results(1.0, 5.0, math.inf)
    assert [found.stable(each) for each in found.tried] == [True, False, False]
    assert (found.largest, found.proposed) == (0.1, 0.025)


def test_the_least_loss_decides_but_keeps_away_from_the_edge_the_more_the_shorter_the_runs() -> None:
    for updates, proposed in ((20, 0.2), (99, 0.2), (100, 0.2), (200, 0.2)):
        found = results(0.9, 0.5, 0.7, 0.8, 0.8, 3.0, updates=updates)
        assert (found.largest, found.proposed) == (1.6, proposed)
    for updates, proposed in ((20, 0.2), (99, 0.2), (100, 0.4), (200, 0.4)):
        assert results(0.9, 0.9, 0.7, 0.8, 0.5, 3.0, updates=updates).proposed == proposed
    assert (results(3.0).largest, results(3.0).proposed) == (None, None)


def test_an_edge_that_was_not_found_is_told() -> None:
    assert "the edge is above it" in sentences(results(1.0, 0.5), 8)[0]
    assert "the edge" not in sentences(results(1.0, 3.0), 8)[0]
    assert "4 times below" in sentences(results(1.0, 0.5, 3.0), 8)[1]
    assert "no learning rate down to 0.1 is stable" in sentences(results(3.0), 8)[0]
