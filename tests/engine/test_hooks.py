"""Hooks: what they see, what they may ask for, what they cannot break; the best checkpoint and early stopping."""

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import events, parameters
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from distgrow import (
    ConfigError,
    EarlyStopping,
    EndRun,
    Hook,
    KeepBest,
    KeepCheckpoint,
    LogSamples,
    RunSpec,
    Torch,
    budget,
    ema,
    every,
    exponential,
    fit,
    sqrt_lr,
)
from distgrow.checkpoint import writer
from distgrow.checkpoint.spec import Checkpointing
from distgrow.checkpoint.storage import Folder
from distgrow.data.datasets import Arrays
from distgrow.training.hooks import METHODS, EvaluationMade, HookPlace, RunBegun, RunEnded, UpdateMade
from distgrow.training.result import Result
from distgrow.training.spec import Evaluation


def data(rows: int, seed: int = 0) -> Arrays:
    generator = torch.Generator().manual_seed(seed)
    return Arrays(torch.randn(rows, 5, generator=generator), torch.randint(3, (rows,), generator=generator))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(folder: Path, *hooks: Any, keep: int = 1, **more: Any) -> Result:
    """A run of 3 stages in which the test loss falls, and then rises, as its labels are noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 3))
    settings: dict[str, Any] = {
        "test": data(40, seed=1),
        "growth": exponential(start=4, factor=2, cap=16),
        "stages": every(steps=20),
        "lr": sqrt_lr(0.5),
        "budget": budget(steps=60),
        "run": RunSpec(
            dir=str(folder), eval=Evaluation(every_steps=6), checkpoint=Checkpointing(every_steps=5, keep=keep)
        ),
    }
    return fit(model, loss, data(60), hooks=hooks, **settings | more)


class Recorder(Hook):
    """Remember every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def begin(self, run: RunBegun) -> None:
        self.calls.append(("begin", run))

    def after_update(self, update: UpdateMade) -> EndRun | None:
        self.calls.append(("after_update", update))

    def after_eval(self, evaluation: EvaluationMade) -> EndRun | KeepCheckpoint | None:
        self.calls.append(("after_eval", evaluation))

    def before_checkpoint(self, place: HookPlace) -> None:
        self.calls.append(("before_checkpoint", place))

    def end(self, run: RunEnded) -> None:
        self.calls.append(("end", run))

    def of(self, method: str) -> list[Any]:
        return [value for name, value in self.calls if name == method]


class Raising(Hook):
    """Raise in one method, once it is at a step."""

    def __init__(self, method: str, step: int = 0) -> None:
        setattr(self, method, lambda value: self.fail() if value.step >= step else None)

    def fail(self) -> None:
        raise RuntimeError("the disk of my hook is full")


def losses(folder: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(folder, "eval")}


def test_a_hook_sees_what_the_run_logs_and_changes_nothing(tmp_path: Path) -> None:
    hook = Recorder()
    result = trained(tmp_path / "watched", hook)
    trained(tmp_path / "plain")
    assert torch.equal(parameters(tmp_path / "watched"), parameters(tmp_path / "plain"))
    for key in ("step", "samples", "epoch", "stage", "batch", "lr", "loss", "grad_norm"):
        seen = [getattr(update, key) for update in hook.of("after_update")]
        assert seen == [event[key] for event in events(tmp_path / "watched", "step")]
    assert {made.step: made.metrics["loss"] for made in hook.of("after_eval")} == losses(tmp_path / "watched")
    written = [event["step"] for event in events(tmp_path / "watched", "checkpoint")]
    assert [place.step for place in hook.of("before_checkpoint")] == written
    assert [name for name, _ in hook.calls[:1] + hook.calls[-1:]] == ["begin", "end"]
    (begun,), (ended,) = hook.of("begin"), hook.of("end")
    assert (begun.dir, begun.tests, begun.resumed, begun.rank, begun.world) == (
        tmp_path / "watched",
        ("",),
        False,
        0,
        1,
    )
    assert (ended.reason, ended.finished, ended.metrics) == ("done", True, result.metrics)


def test_without_hooks_nothing_is_called_after_an_update(tmp_path: Path) -> None:
    class Idle(Hook):
        pass

    class Fails:
        after_update = None

        def end(self, run: RunEnded) -> None:
            pass

    trained(tmp_path / "run", Idle(), Fails())  # methods of Hook itself, and values that are no methods, are left out


@pytest.mark.parametrize(("method", "last"), [("after_update", 11), ("after_eval", 12)])
def test_an_end_that_a_hook_asks_for_is_a_finished_run_with_its_reason(method: str, last: int, tmp_path: Path) -> None:
    class Ends:
        """A hook needs no base."""

    hook = Ends()
    setattr(hook, method, lambda value: EndRun("enough") if value.step >= 10 else None)
    result = trained(tmp_path / "run", hook)
    assert (result.finished, result.reason, result.progress.step) == (True, "enough", last)
    assert [event["reason"] for event in events(tmp_path / "run", "end")] == ["enough"]
    assert list(losses(tmp_path / "run")) == [6, last]
    again = trained(tmp_path / "run", hook, resume=True)
    assert (again.finished, again.reason, again.progress.step) == (True, "enough", last)
    assert list(losses(tmp_path / "run")) == [6, last]


@pytest.mark.parametrize("method", METHODS)
def test_what_a_hook_raises_ends_the_run_as_an_error_of_its_author_and_loses_nothing(
    method: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"Raising.{method} raised RuntimeError: the disk of my hook is full"):
        trained(tmp_path / "run", Raising(method, step=17 if method != "begin" else 0))
    result = trained(tmp_path / "run", resume=True)
    trained(tmp_path / "plain")
    assert result.progress.step == 60
    assert torch.equal(parameters(tmp_path / "run"), parameters(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("method", "answer", "allowed"),
    [
        ("after_update", "enough", r"None, or EndRun\(reason\)"),
        ("after_update", KeepCheckpoint("best"), r"None, or EndRun\(reason\)"),
        ("after_eval", True, r"None, EndRun\(reason\) or KeepCheckpoint\(name\)"),
        ("after_eval", EndRun(""), "not empty"),
        ("begin", EndRun("enough"), "allowed is None$"),
        ("before_checkpoint", 1, "allowed is None$"),
    ],
)
def test_an_answer_that_means_nothing_is_refused(method: str, answer: Any, allowed: str, tmp_path: Path) -> None:
    hook = Hook()
    setattr(hook, method, lambda _: answer)
    with pytest.raises(ConfigError, match=allowed):
        trained(tmp_path / "run", hook)


@pytest.mark.parametrize("hooks", [(EarlyStopping,), (3,), ("early",)])
def test_what_is_no_hook_is_refused_before_the_run(hooks: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hooks\[0\]="):
        trained(tmp_path / "run", *hooks)
    assert not (tmp_path / "run").exists()


def test_a_method_that_would_never_be_called_is_refused_with_those_that_are(tmp_path: Path) -> None:
    class Misspelt(Hook):
        def after_evaluation(self, evaluation: Any) -> None: ...

    with pytest.raises(ConfigError, match=r"hooks\[0\]: Misspelt.after_evaluation would never .*after_eval,"):
        trained(tmp_path / "run", Misspelt())
    assert not (tmp_path / "run").exists()


# ── the best checkpoint ─────────────────────────────────────────────────────────────────────────────────────────


def kept(folder: Path) -> tuple[set[int], int]:
    """The steps of all checkpoints, and the one that the newest says is the best."""
    store = Folder(folder / "checkpoints")
    assert all(writer.check(store.fetch(name)) is None for name in store.names())
    return {int(name[5:13]) for name in store.names()}, writer.kept(store.fetch(store.names()[-1]))["best"]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_checkpoint_of_the_best_evaluation_stays_however_many_are_newer(mode: Any, tmp_path: Path) -> None:
    trained(tmp_path / "run", KeepBest("loss", mode))
    found = losses(tmp_path / "run")
    best = (min if mode == "min" else max)(found, key=lambda step: found[step])
    assert kept(tmp_path / "run") == ({best, 60}, best)
    assert 6 <= best < 60 or mode == "max"


@pytest.mark.parametrize("failing", [8, 13, 26, 57])
def test_the_best_is_the_same_after_an_interruption_anywhere(failing: int, tmp_path: Path) -> None:
    trained(tmp_path / "plain", KeepBest())
    with pytest.raises(ConfigError, match="my hook"):
        trained(tmp_path / "run", KeepBest(), Raising("after_update", failing))
    trained(tmp_path / "run", KeepBest(), resume=True)
    assert kept(tmp_path / "run") == kept(tmp_path / "plain")


def test_a_best_metric_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.keep\.best=accuracy: .* it has loss"):
        trained(tmp_path / "run", KeepBest("accuracy"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"needs a test set.*test="):
        trained(tmp_path / "other", KeepBest(), test=None)


def accuracy(model: nn.Module, batch: Any) -> dict[str, Any]:
    return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float().mean()}


def test_metrics_of_ones_own_and_of_named_sets_are_known_before_the_run(tmp_path: Path) -> None:
    several = {"clean": data(40, seed=1), "other": data(40, seed=2)}
    stop = EarlyStopping("clean/loss")
    with pytest.raises(ConfigError, match=r"run\.early_stopping\.metric=clean/loss: .* it has clean/acc.*, other/acc"):
        trained(tmp_path / "run", stop, metrics=accuracy, test=several)
    assert not (tmp_path / "run").exists()
    trained(tmp_path / "run", KeepBest("other/accuracy", "max"), metrics=accuracy, test=several)
    trained(tmp_path / "average", KeepBest("average/loss"), average=ema(epochs=0.5))


def test_a_metric_that_the_first_rows_lack_may_come_with_others(tmp_path: Path) -> None:
    """Of pairs (sum, count) a batch may lack some: the first 40 rows have no class 2 of their own."""

    def each(model: nn.Module, batch: Any) -> dict[str, Any]:
        right = model(batch[0]).argmax(1) == batch[1]
        return {f"class{int(k)}": (right[batch[1] == k].sum(), (batch[1] == k).sum()) for k in batch[1].unique()}

    test = Arrays(data(80).inputs, torch.tensor([0] * 40 + [2] * 40))
    assert trained(tmp_path / "run", KeepBest("class2", "max"), metrics=each, test=test).finished


def test_two_that_keep_the_best_are_refused_as_there_is_one_best(tmp_path: Path) -> None:
    for name, hooks, keep in (("two", [KeepBest(), KeepBest("loss", "max")], None), ("spec", [KeepBest()], "loss")):
        with pytest.raises(ConfigError, match="2 hooks are KeepBest .*leave one"):
            trained(tmp_path / name, *hooks, run=RunSpec(dir=str(tmp_path / name), keep=keep and {"best": keep}))
        assert not (tmp_path / name).exists()


# ── early stopping ──────────────────────────────────────────────────────────────────────────────────────────────


@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 1.05, 2.0, 3.0, math.nan]), max_size=12),
    patience=st.integers(1, 4),
    least=st.sampled_from([0.0, 0.1]),
    cut=st.integers(0, 12),
)
def test_early_stopping_gives_up_after_so_many_evaluations_without_a_better_one(
    values: list[float], patience: int, least: float, cut: int
) -> None:
    """Whoever asks for the last `patience` values knows it; also if the state was saved and loaded in between."""
    hook, ended = EarlyStopping(patience=patience, min_delta=least), None
    for k, value in enumerate(values):
        if k == cut:
            state = hook.state_dict()
            hook = EarlyStopping(patience=patience, min_delta=least)
            hook.load_state_dict(state)
        made = EvaluationMade(step=k, samples=k, epoch=0.0, stage=0, metrics={"loss": value})
        if hook.after_eval(made) is not None:
            ended = k
            break
    better, best = [], math.inf
    for value in values:
        better.append(value < best and (best == math.inf or best - value > least))
        best = value if better[-1] else best
    expected = [k for k in range(patience - 1, len(values)) if not any(better[k - patience + 1 : k + 1])]
    assert ended == (expected[0] if expected else None)


def test_early_stopping_of_a_config_ends_the_run_where_the_hook_would(tmp_path: Path) -> None:
    spec = RunSpec.model_validate(
        {
            "dir": str(tmp_path / "run"), "eval": {"every_steps": 6}, "keep": {"best": "average/loss"},
            "early_stopping": {"patience": 2}, "checkpoint": {"keep": 1},
            "hooks": [{"target": "distgrow:LogSamples", "args": {"sample": "test_hooks:weight"}}],
        }
    )  # fmt: skip
    result = trained(tmp_path / "run", run=spec, average=ema(samples=50), engine=Torch(max_micro=8))
    found = losses(tmp_path / "run")
    assert result.finished
    assert result.progress.step < 60
    assert "early stopping: loss is no better than" in result.reason
    assert list(found)[-1] == result.progress.step
    assert min(found.values()) == list(found.values())[-3]
    averages = {event["step"]: event["average/loss"] for event in events(tmp_path / "run", "eval")}
    assert kept(tmp_path / "run")[1] == min(averages, key=lambda step: averages[step])
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(found)
    assert lines[0]["made"] != lines[-1]["made"]


def weight(model: nn.Module) -> dict[str, float]:
    """A sample of a model that must be in eval mode."""
    assert not model.training
    return {"weight": float(next(model.parameters()).sum())}


def test_sampling_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must return what JSON can hold"):
        trained(tmp_path / "run", LogSamples(lambda model: model))
    with pytest.raises(ConfigError, match="must be a function"):
        LogSamples(3)  # pyright: ignore[reportArgumentType]


# ── state ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Average(Hook):
    """An average of the author's own, which must survive a resume."""

    def begin(self, run: RunBegun) -> None:
        self.model = run.model
        self.mean = getattr(self, "mean", torch.zeros(15, 7)[:, 2:])

    def after_update(self, update: UpdateMade) -> None:
        self.mean = 0.9 * self.mean + 0.1 * update.loss

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


def test_the_state_of_a_hook_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    whole, first, second = Average(), Average(), Average()
    trained(tmp_path / "plain", whole)
    with pytest.raises(ConfigError, match="my hook"):
        trained(tmp_path / "run", first, Raising("after_update", 33))
    trained(tmp_path / "run", Recorder(), second, resume=True)
    assert torch.equal(second.mean, whole.mean)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Path(), "holds .*pathlib"),
        (lambda: 1, "cannot be written.*lambda"),
        (threading.Lock(), "cannot be written.*lock"),
    ],
)
def test_a_state_that_would_execute_code_is_refused_when_it_is_written(value: Any, said: str, tmp_path: Path) -> None:
    hook = Average()
    hook.state_dict = lambda: {"mine": value}
    with pytest.raises(ConfigError, match=f"the state of a hook {said}"):
        trained(tmp_path / "run", hook)


# ── several test sets ───────────────────────────────────────────────────────────────────────────────────────────


def test_several_test_sets_are_evaluated_as_each_alone_would_be(tmp_path: Path) -> None:
    hook = Recorder()
    both = trained(tmp_path / "run", hook, test={"clean": data(40, seed=1), "hard": data(17, seed=2)})
    alone = [trained(tmp_path / str(seed), test=data(rows, seed)).metrics["loss"] for rows, seed in ((40, 1), (17, 2))]
    assert both.metrics == {"clean/loss": alone[0], "hard/loss": alone[1]}
    assert hook.of("begin")[0].tests == ("clean", "hard")
    assert set(events(tmp_path / "run", "eval")[0]) >= {"clean/loss", "hard/loss"}


@pytest.mark.parametrize(
    ("test", "told"),
    [
        ({}, "names no test set"),
        ({"a/b": data(3)}, "cannot be the name of a test set"),
        ({"": data(3)}, "cannot be the name of a test set"),
        ({"a": data(3), 1: data(3)}, "cannot be the name of a test set"),
        ({"clean": data(0)}, "the test set 'clean' is empty"),
        ({"clean": 3}, r"test\['clean'\]"),
    ],
)
def test_test_sets_that_cannot_be_are_refused_by_name(test: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        trained(tmp_path / "run", test=test)
    assert not (tmp_path / "run" / "config.yaml").exists()
