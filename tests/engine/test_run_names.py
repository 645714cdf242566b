"""Names of runs: {name} and {n} in run.dir, and when step lines are logged."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from distgrow import Result, RunSpec, budget, constant, constant_lr, fit
from distgrow.config import load
from distgrow.core.errors import RunError
from distgrow.run.folder import numbered
from distgrow.run.resume_mode import ResumeMode

ROWS = TensorDataset(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2)


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def result(spec: RunSpec, epochs: float = 1.0, *, resume: bool | None = False) -> Result:
    torch.manual_seed(0)
    settings = {"growth": constant(8), "lr": constant_lr(0.1), "budget": budget(epochs=epochs)}
    return fit(nn.Linear(3, 2), loss, ROWS, **settings, run=spec, resume=resume)


def train(spec: RunSpec, epochs: float = 1.0, *, resume: bool | None = False) -> int:
    return result(spec, epochs, resume=resume).progress.step


def test_the_result_says_which_folder_was_counted_up_to(tmp_path: Path) -> None:
    spec = RunSpec(dir=f"{tmp_path}/{{name}}-{{n}}")
    assert [result(spec).dir, result(spec).dir] == [tmp_path / "run-1", tmp_path / "run-2"]
    assert result(spec, resume=True).dir == tmp_path / "run-2"


def test_runs_count_up_and_a_resume_takes_the_newest(tmp_path: Path) -> None:
    spec = RunSpec(dir=f"{tmp_path}/{{name}}-{{n}}")
    for _ in range(10):
        assert train(spec) == 5
    assert {path.name for path in tmp_path.iterdir()} == {f"run-{n}" for n in range(1, 11)}
    assert train(spec, resume=True) == 5
    assert train(spec, resume=None) == 5
    assert len(list(tmp_path.iterdir())) == 10
    assert f"{tmp_path}/run-10" in (tmp_path / "run-10" / "config.yaml").read_text()


def test_a_resume_without_any_run_is_refused_or_begins_the_first(tmp_path: Path) -> None:
    spec = RunSpec(dir=f"{tmp_path}/a{{n}}/b")
    with pytest.raises(RunError, match="a1/b holds no run"):
        train(spec, resume=True)
    assert train(spec, resume=None) == 5
    assert (tmp_path / "a1" / "b" / "config.yaml").is_file()


@pytest.mark.parametrize(("resume", "number"), [("continue", 12), ("start", 13), ("either", 12)])
def test_numbers_are_compared_as_numbers(resume: str, number: int, tmp_path: Path) -> None:
    for name in ("x-2", "x-12", "x-9", "x-9b", "yx-40", "x-", "z"):
        (tmp_path / name).mkdir()
    assert numbered(f"{tmp_path}/x-{{n}}", resume=ResumeMode(resume), name="x") == f"{tmp_path}/x-{number}"


def test_the_name_is_that_of_the_config(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("growth: {kind: constant}\nbudget: {epochs: 1}\nrun:\n  dir: runs/{name}-{n}\n")
    assert load(config).run.dir == "runs/mine-{n}"


def steps(folder: Path) -> list[int]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event["step"] for event in events if event["event"] == "step"]


@pytest.mark.parametrize(
    ("every", "logged"),
    [
        ({}, list(range(1, 11))),
        ({"log_every": 4}, [4, 8]),
        ({"log_every_samples": 20}, [3, 5, 8, 10]),  # batches of 8: samples 24, 40, 64, 80
        ({"log_every_epochs": 1.0}, [5, 10]),
        ({"log_every_epochs": 0.3}, [2, 3, 5, 6, 8, 9]),  # 12, 24, 36, 48, 60, 72 are passed at 16, 24, 40, 48, 64, 72
    ],
)
def test_step_lines_are_logged_by_updates_samples_or_epochs(every: dict, logged: list[int], tmp_path: Path) -> None:
    train(RunSpec(dir=str(tmp_path / "run"), **every), epochs=2.0)
    assert steps(tmp_path / "run") == logged


def test_two_units_of_logging_are_refused() -> None:
    with pytest.raises(ValueError, match="log_every_samples and run.log_every_epochs"):
        RunSpec(log_every_samples=3, log_every_epochs=1.0)
