"""A user's own task: what is wrong is told in one message, on any number of ranks; what is odd but right runs."""

import json
import math
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Commands, events, ledger, parameters

ODD = """
import collections, os
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from distgrow import Task

X = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))

class Data:
    def __init__(self, rows=200):
        self.rows = rows
    def __len__(self):
        return self.rows
    def __getitem__(self, index):
        return {"x": X[index], "y": X[index].sum()}

def mse(model, batch):
    return F.mse_loss(model(batch["x"]).squeeze(-1), batch["y"])

def sized(rows=200, test=None, metrics=None, **parts):
    return Task(model=nn.Linear(5, 1), loss=parts.pop("loss", mse), train=Data(rows),
                test=Data(test) if test else None, metrics=metrics, **parts)

def look_up(key):
    return {}[key]  # raises

def failing():
    torch.zeros(3)
    return sized(look_up("missing"))  # raises

def frozen():
    return sized_model(nn.Linear(5, 1).requires_grad_(False))

def sized_model(model):
    return Task(model=model, loss=mse, train=Data())

def normed():
    return sized_model(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))

def without_parameters():
    return sized_model(nn.Identity())

def loss_of(kind):
    losses = {
        "vector": lambda model, batch: model(batch["x"]).squeeze(-1),
        "one element": lambda model, batch: mse(model, batch)[None],
        "float": lambda model, batch: float(mse(model, batch)),
        "nothing": lambda model, batch: None,
        "detached": lambda model, batch: mse(model, batch).detach(),
    }
    return sized(loss=losses[kind])

def dropping():
    return sized(collate=lambda rows: default_collate(rows[:-1]))

def measured(name, value):
    values = {"nan": torch.tensor(float("nan")), "vector": torch.ones(3), "one": torch.tensor(1.0)}
    return sized(test=8, metrics=lambda model, batch: {name: values[value]})

def unused():
    model = nn.Linear(5, 1)
    model.spare = nn.Linear(3, 3)
    return sized_model(model)

def evaluating():
    model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5), nn.Linear(5, 1)).eval()
    def loss(model, batch):
        if torch.is_grad_enabled():
            assert model.training
        return mse(model, batch)
    return Task(model=model, loss=loss, train=Data(), test=Data(8))

def mapping():
    return sized(collate=lambda rows: collections.UserDict(default_collate(rows)))

def on_rank_one():
    if os.environ.get("RANK") == "1":
        raise FileNotFoundError("this host lacks the data")
    return sized()

class Stubborn(Exception):
    def __init__(self, host, status):
        super().__init__(f"{host} answered {status}")

def stubborn_on_rank_one():
    if os.environ.get("RANK") == "1":
        raise Stubborn("storage.example.org", 503)
    return sized()

def refused_on_rank_one():
    from distgrow import ConfigError
    if os.environ.get("RANK") == "1":
        raise ConfigError("this host lacks the data: mount it")
    return sized()
"""


@pytest.fixture
def odd(distgrow: Commands) -> Commands:
    (distgrow.folder / "odd.py").write_text(ODD)
    (distgrow.folder / "fails.py").write_text("raise ValueError('at import')")
    (distgrow.folder / "leaves.py").write_text("import sys; sys.exit(3)")
    (distgrow.folder / "typo.py").write_text("def make(:")
    return distgrow


def target(name: str, /, **args: object) -> tuple[str, ...]:
    module, _, function = name.rpartition(":")
    return (f"task={{kind: target, target: '{module or 'odd'}:{function}', args: {json.dumps(args)}}}", "model=null")


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (target("fails:make"), "fails where it is imported: ValueError: at import"),
        (target("leaves:make"), "fails where it is imported: SystemExit: 3"),
        (target("typo:make"), "fails where it is imported: SyntaxError"),
        (target("sized", colour="red", loss_=1, nothing=2, kind="x", metrics=None, ro=1), "unexpected keyword"),
        (target("measured", name="x"), "do not fit task.target='odd:measured': missing a required argument: 'value'"),
        (target("frozen"), "model has no parameter that can be trained"),
        (target("without_parameters"), "model has no parameter that can be trained"),
        (target("loss_of", kind="vector"), "the loss has shape (8,); it must be one number"),
        (target("loss_of", kind="one element"), "the loss has shape (1,)"),
        (target("loss_of", kind="float"), "the loss returned float"),
        (target("loss_of", kind="nothing"), "the loss returned NoneType"),
        (target("loss_of", kind="detached"), "the loss has no gradient"),
        (target("dropping"), "row where the plan has"),
        (target("measured", name="x", value="vector"), "the metric 'x' has shape (3,)"),
        (target("measured", name="epoch", value="one"), "task.metrics returns epoch, which every event has; rename it"),
        (target("measured", name="step", value="one"), "task.metrics returns step"),
    ],
)
def test_what_is_wrong_with_a_task_is_told(odd: Commands, task: tuple[str, ...], told: str) -> None:
    finished = odd.train("run", *task)
    assert finished.code == 2, finished.err
    assert told in finished.err
    assert "Traceback" not in finished.err
    assert not (odd.folder / "run").exists()


@pytest.mark.parametrize("verb", ["plan", "verify", "train", "train launch.workers=2", "train launch.workers=[1,2]"])
def test_a_target_that_raises_is_told_with_the_users_lines_alone(odd: Commands, verb: str) -> None:
    command, *more = verb.split()
    words = [str(ROOT / "configs/digits.yaml"), *TINY, *target("failing"), "run.dir=run", *more]
    finished = odd(command, *words)
    assert finished.code == 2, finished.err
    file, lines = odd.folder / "odd.py", ODD.split("\n")
    inner, outer = (k + 1 for k, line in enumerate(lines) if line.endswith("# raises"))
    assert finished.err.splitlines() == [
        "distgrow: task.target='odd:failing' raised KeyError: 'missing'; mend it there:",
        f"  {file}:{outer}, in failing: {lines[outer - 1].strip()}",
        f"  {file}:{inner}, in look_up: {lines[inner - 1].strip()}",
    ]
    assert not (odd.folder / "run").exists()


@pytest.mark.parametrize("workers", ["2", "[1,2]"])
def test_a_loss_that_ranks_refuse_leaves_no_folder(odd: Commands, workers: str) -> None:
    finished = odd.train("run", *target("loss_of", kind="vector"), f"launch.workers={workers}", "engine.max_micro=8")
    assert finished.code == 2, finished.err
    assert finished.err.count("the loss has shape (8,); it must be one number") == 1
    assert not (odd.folder / "run").exists()


def test_one_row_a_rank_is_refused_for_batch_norm_with_a_way_out_that_trains(odd: Commands) -> None:
    normed, one_each = target("normed"), "growth={kind: constant, start: 2}"
    finished = odd.train("run", *normed, one_each, "launch.workers=2", "engine.max_micro=8")
    assert finished.code == 2, finished.err
    told = "growth.start=2 on 2 ranks with engine.max_micro=8 has micro-batches of one row, and BatchNorm cannot"
    assert finished.err.count(told) == 1
    assert "Traceback" not in finished.err
    assert not (odd.folder / "run").exists()
    assert odd.train("run", *normed, one_each).code == 0


def test_a_metric_that_is_not_finite_is_null_and_nothing_is_lost(odd: Commands) -> None:
    assert odd.train("run", *target("measured", name="odds", value="nan")).code == 0
    assert events(odd.folder / "run", "eval")[-1]["odds"] is None
    assert len(events(odd.folder / "run", "step")) == events(odd.folder / "run", "end")[0]["step"]


@pytest.mark.parametrize("test_rows", [1, 2])
def test_a_test_set_smaller_than_the_world_is_evaluated(odd: Commands, test_rows: int) -> None:
    assert odd.train("one", *target("sized", test=test_rows), "engine.precision=float64").code == 0
    assert odd.train("three", *target("sized", test=test_rows), "engine.precision=float64", workers=3).code == 0
    one, three = (events(odd.folder / run, "eval")[-1]["loss"] for run in ("one", "three"))
    assert math.isclose(one, three, rel_tol=1e-9)


def test_an_unused_parameter_trains_alone_and_is_named_in_a_group(odd: Commands) -> None:
    assert odd.train("alone", *target("unused")).code == 0
    group = odd.train("group", *target("unused"), "launch.workers=2")
    assert group.code == 2
    assert "the loss does not depend on spare.weight, spare.bias" in group.err


def test_a_model_that_comes_in_eval_mode_is_trained_in_train_mode(odd: Commands) -> None:
    assert odd.train("run", *target("evaluating")).code == 0


def test_a_mapping_of_any_kind_is_a_batch(odd: Commands) -> None:
    assert odd.train("mapping", *target("mapping"), "engine.precision=float64").code == 0
    assert odd.train("plain", *target("sized"), "engine.precision=float64").code == 0
    assert (parameters(odd.folder / "mapping") == parameters(odd.folder / "plain")).all()


@pytest.mark.slow
def test_what_only_another_rank_meets_is_told_first(odd: Commands) -> None:
    refused = odd.train("refused", *target("refused_on_rank_one"), "launch.workers=2")
    assert refused.code == 2
    assert refused.err.count("distgrow: this host lacks the data: mount it") == 1
    raised = odd.train("raised", *target("on_rank_one"), "launch.workers=2")
    assert raised.code == 2
    assert "raised FileNotFoundError: this host lacks the data" in raised.err
    stubborn = odd.train("stubborn", *target("stubborn_on_rank_one"), "launch.workers=2")
    assert stubborn.code == 2
    assert "raised Stubborn: storage.example.org answered 503" in stubborn.err  # though pickle cannot carry it


def test_a_run_does_not_go_on_with_other_data(odd: Commands) -> None:
    assert odd.train("run", *target("sized", rows=100), "run.checkpoint={every_steps: 5}").code == 0
    finished = odd.train("run", *target("sized", rows=100), resume=True)
    assert finished.code == 0
    config = odd.folder / "run/config.yaml"
    config.write_text(config.read_text().replace("rows: 100", "rows: 150"))
    finished = odd.train("run", *target("sized", rows=150), resume=True)
    assert finished.code == 2
    assert "100 training samples then, 150 now" in finished.err


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(odd: Commands, tmp_path: Path) -> None:
    assert odd.train("run", *target("sized")).code == 0
    for path in (odd.folder / "run/checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    before = (odd.folder / "run/metrics.jsonl").read_bytes()
    finished = odd.train("run", *target("sized"), resume=True)
    assert finished.code == 2
    assert "no intact checkpoint (none is there)" in finished.err
    assert (odd.folder / "run/metrics.jsonl").read_bytes() == before


def test_auto_resume_begins_a_run_and_goes_on_with_one(odd: Commands) -> None:
    for applied in (600, 1500):
        finished = odd.train("run", *target("sized"), "--auto-resume", f"budget={{samples: {applied}}}")
        assert finished.code == 0
        assert ledger(odd.folder / "run")["applied"] == applied
        assert ("resumed from" in finished.err) == (applied == 1500)
    finished = odd.train("run", *target("sized"), "--auto-resume", "budget={samples: 1500}", "run.seed=1")
    assert finished.code == 2
    assert "run.seed: 0 in the folder, 1 now" in finished.err


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (("config.yaml", ""), "config.yaml is damaged: it holds None"),
        (("config.yaml", "5"), "config.yaml is damaged: it holds 5"),
        (("config.yaml", "a: ["), "config.yaml is damaged: run/config.yaml:1: is not YAML"),
        (("metrics.jsonl", "5\n"), "metrics.jsonl:1 is damaged: the line '5' lacks one of event"),
        (("checkpoints/step-00000010.bak", ""), None),
    ],
)
def test_a_damaged_folder_is_named(odd: Commands, damage: tuple[str, str], told: str | None) -> None:
    assert odd.train("run", *target("sized")).code == 0
    (odd.folder / "run" / damage[0]).write_text(damage[1])
    finished = odd.train("run", *target("sized"), resume=True)
    assert finished.code == (0 if told is None else 2)
    assert (told or "") in finished.err
    assert "Traceback" not in finished.err
