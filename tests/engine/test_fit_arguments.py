"""fit() refuses what it cannot use by the argument's name, and speaks of resume=True."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

import distgrow
from distgrow import ConfigError, RunSpec
from distgrow.core.budget import Budget
from distgrow.growth.steps import Steps
from distgrow.optim import OptimizerSpec


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).pow(2).mean()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: distgrow.LR(rule="sqrt"), "LR: rule='sqrt': must be a mapping; write rule: {kind: sqrt}"),
        (lambda: distgrow.budget(epochs=1, steps=2), "Budget: give exactly one of"),
        (lambda: distgrow.SGD(momentun=0.9), "SGD: momentun: unknown key; did you mean 'momentum'?"),
        (lambda: distgrow.exponential(8, 2, 4), "Exponential: start=8 is above cap=4"),
        (lambda: distgrow.init_from("run", step=-1), "Init: step=-1: must be greater than or equal to 0"),
        (lambda: distgrow.AdamW(beta1=2, groups=[{"match": "("}]), "beta1=2: must be less than 1"),
    ],
)
def test_wrong_settings_from_python_are_told_as_those_of_a_config(make: Any, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert told in str(refused.value)
    assert "pydantic" not in str(refused.value)


def fit(tmp_path: Path, **changed: Any) -> Any:
    arguments: dict[str, Any] = {"model": nn.Linear(3, 1), "loss": loss, "train": torch.randn(20, 3)}
    arguments |= {"growth": distgrow.constant(4), "budget": distgrow.budget(steps=2)}
    arguments["run"] = RunSpec(dir=str(tmp_path / "run"))
    return distgrow.fit(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("optimizer", "adamw", "AdamW()"),
        ("budget", 4, "budget(epochs=4)"),
        ("budget", None, "budget(epochs=4)"),
        ("run", {"dir": "runs/x"}, "RunSpec(dir="),
        ("growth", [8, 16], "batches([8, 16])"),
        ("growth", None, "batches([8, 16])"),
        ("lr", 0.1, "constant_lr(0.1)"),
        ("lr", "auto", 'constant_lr("auto")'),
        ("stages", 5, "every(epochs=1)"),
        ("engine", "torch", "Torch(max_micro=64)"),
        ("metrics", {"accuracy": 1.0}, "a dict of names and values"),
        ("loss", None, "loss(model, batch)"),
        ("loss", nn.CrossEntropyLoss(), "criterion(model(batch[0]), batch[1])"),
        ("collate", 3, "collate(samples)"),
        ("about", 5, "a dict"),
        ("group", 2, "a Group"),
        ("model", "resnet8", "torch.nn.Module"),
    ],
)
def test_an_argument_of_the_wrong_type_is_refused_by_name(name: str, value: Any, allowed: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        fit(tmp_path, **{name: value})
    assert str(refused.value).startswith(f"{name}=")
    assert type(value).__name__ in str(refused.value)
    assert allowed in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("optimizer", distgrow.AdamW, "optimizer=AdamW (a class): call it, AdamW(); "),
        ("budget", Budget, "budget=Budget (a class): call it, Budget(); "),
        ("growth", distgrow.exponential, "growth=exponential (a function): call it, exponential(…); "),
        ("growth", Steps, "growth=Steps (a class): call it, Steps(…); "),
        ("stages", distgrow.every, "stages=every (a function): call it, every(…); "),
        ("engine", distgrow.Torch, "engine=Torch (a class): call it, Torch(); "),
        ("run", RunSpec, "run=RunSpec (a class): call it, RunSpec(); "),
    ],
)
def test_a_spec_that_is_not_called_is_shown_by_its_name(name: str, value: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        fit(tmp_path, **{name: value})
    assert told in str(refused.value)
    assert "Metaclass" not in str(refused.value)
    assert "allowed is" in str(refused.value)


def test_a_result_is_one_line_with_what_was_done(tmp_path: Path) -> None:
    result = fit(tmp_path, test=torch.randn(5, 3))
    shown = f"<Result: finished, 2 updates, 8 samples, 8 gradient evaluations, loss={result.metrics['loss']:.6g}>"
    assert repr(result) == str(result) == shown


def test_a_tracker_that_is_none_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trackers\[0\]='wandb' .*log\(event\) and close\(\)"):
        fit(tmp_path, trackers=["wandb"])
    assert not (tmp_path / "run").exists()


def test_metrics_that_return_no_dict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="metrics are a float; return a dict"):
        fit(tmp_path, test=torch.randn(5, 3), metrics=lambda model, batch: 0.5)


def test_errors_name_the_argument_resume_and_not_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without resume=True"):
        fit(tmp_path, resume=True)
    fit(tmp_path)
    with pytest.raises(ConfigError, match="continue it with resume=True"):
        fit(tmp_path)


def test_an_optimizer_without_build_is_refused_when_it_is_made() -> None:
    class Unbuilt(OptimizerSpec):
        kind: Literal["unbuilt"] = "unbuilt"

    make: Any = Unbuilt
    with pytest.raises(TypeError, match="abstract.*build"):
        make()


def test_another_resume_than_the_three_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume='yes': allowed is True .* False .* None"):
        fit(tmp_path, resume="yes")
    assert not (tmp_path / "run").exists()
