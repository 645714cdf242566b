"""Branches of a run's checkpoint: the first goes the run's own way, none touches the run, and bad ones are refused."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import events
from torch import nn
from torch.nn import functional as F

from distgrow import RunSpec, budget, constant, fit
from distgrow.config.load import parse
from distgrow.core.errors import ConfigError
from distgrow.critical_batch.branches import ProbeOptions
from distgrow.critical_batch.probe import probe_batch
from distgrow.data.datasets import digits

BATCH, SAMPLES = 16, 1024


def config(folder: Path, **settings: Any) -> dict[str, Any]:
    """Softmax regression on the digits for 128 updates, checkpoints at every 32."""
    return {
        "model": {"kind": "softmax"},
        "growth": {"kind": "constant", "start": BATCH},
        "lr": {"base": 0.05, "decay": {"kind": "cosine"}},
        "budget": {"samples": 2 * SAMPLES},
        "run": {"dir": str(folder), "checkpoint": {"every_steps": 32, "keep": 9}, "eval": {"every_epochs": 100.0}},
        **settings,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is over."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    parse(config(folder)).fit()
    return folder


@pytest.fixture
def halfway(run: Path, tmp_path: Path) -> Path:
    """The checkpoint after half of a copy of it."""
    shutil.copytree(run, tmp_path / "run")
    return next(path for path in (tmp_path / "run/checkpoints").iterdir() if path.name == "step-00000064")


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def told(folder: Path, checkpoint: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The branches and the result that were written."""
    lines = (folder / f"probe-batch-{checkpoint}.jsonl").read_text().splitlines()
    *branches, result = map(json.loads, lines)
    return branches, result


def test_the_first_branch_goes_the_runs_own_way_and_all_cost_their_samples(halfway: Path) -> None:
    folder = halfway.parent.parent
    probe_batch(str(halfway), ProbeOptions(samples=SAMPLES, up_to=4))
    branches, _ = told(folder, halfway.name)
    steps = events(folder, "step")[64:]
    window = [step["loss"] for step in steps[-SAMPLES // 4 // BATCH :]]
    assert branches[0]["loss"] == pytest.approx(sum(window) / len(window), rel=1e-12)
    assert branches[0]["test_loss"] == events(folder, "eval")[-1]["loss"]
    assert branches[0]["lr"] == steps[0]["lr"]
    for branch, k in zip(branches, (1, 2, 4), strict=True):
        assert (branch["k"], branch["batch"], branch["updates"]) == (k, k * BATCH, SAMPLES // (k * BATCH))
        assert branch["lr"] == pytest.approx(k * steps[0]["lr"], rel=1e-12)
        assert branch["evaluations"] == SAMPLES


def test_the_run_is_not_touched(halfway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = halfway.parent.parent
    before = contents(folder)
    probe_batch(str(halfway), ProbeOptions(samples=512, up_to=2))
    after = contents(folder)
    added = {f"probe-batch-{halfway.name}.{kind}" for kind in ("jsonl", "png")}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == added
    assert not list(folder.glob(".branches*"))
    assert "1,024 gradient evaluations" in capsys.readouterr().out
    resumed = parse(config(folder)).fit(resume=True)
    assert resumed.progress.ledger.applied == 2 * SAMPLES


def test_a_runs_folder_stands_for_its_newest_intact_checkpoint_and_results_go_where_they_shall(
    halfway: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = halfway.parent.parent
    for path in halfway.parent.iterdir():
        if path.name > halfway.name:
            (path / "engine.pt").write_bytes(b"damaged")
    before = contents(folder)
    options = ProbeOptions(samples=512, up_to=2, rule="sqrt", tolerance=10.0, out=str(tmp_path / "results"))
    probe_batch(str(folder), options)
    assert contents(folder) == before
    branches, result = told(tmp_path / "results", halfway.name)
    assert branches[1]["lr"] == pytest.approx(2**0.5 * branches[0]["lr"], rel=1e-12)
    assert result["training_batch"] == result["test_batch"] == 32
    captured = capsys.readouterr()
    assert "damaged and not used: step-00000128: engine.pt does not match" in captured.err
    assert "largest batch no worse in training loss, within 10: 32 = 2 × 16; a larger one may be too" in captured.out


def test_a_branch_that_diverges_is_told_as_such_and_is_worse(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flat = config(folder, model={"kind": "mlp"}, lr={"base": 1e-6, "decay": {"kind": "none"}}, budget={"steps": 2})
    flat["run"]["max_skips"] = 3
    parse(flat).fit()
    settings = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(settings.replace("base: 1.0e-06", "base: 1.0e+18"))
    for checkpoint in sorted((folder / "checkpoints").iterdir())[:-1]:
        shutil.rmtree(checkpoint)
    probe_batch(str(folder), ProbeOptions(samples=512, up_to=2))
    branches, result = told(folder, "step-00000002")
    assert [branch["loss"] for branch in branches] == [None, None]
    assert result["training_batch"] == BATCH


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "there is no such folder; give RUN/checkpoints/step-"),
        ("run/checkpoints", "is neither a run's folder nor one of its checkpoints"),
        ("run/tensorboard", "is neither a run's folder nor one of its checkpoints"),
        ("run/checkpoints/step-00000064", "is damaged: engine.pt does not match its digest; choose another"),
        ("run/checkpoints/step-00000128", "the learning rate's decay ends 0 samples after step-00000128"),
        ("run/checkpoints/step-00000096", "--samples 1024: the learning rate's decay ends 512 samples after"),
    ],
)
def test_what_cannot_be_branched_is_refused_with_the_way_out(
    path: str, message: str, halfway: Path, tmp_path: Path
) -> None:
    (tmp_path / "run/tensorboard").mkdir(exist_ok=True)
    (halfway / "engine.pt").write_bytes(b"damaged")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=message):
        probe_batch(str(tmp_path / path), ProbeOptions(samples=SAMPLES))
    assert contents(tmp_path) == before


def test_a_config_in_place_of_a_run_is_answered_with_its_run(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("budget: {epochs: 1}\nrun: {dir: 'runs/of-{name}'}")
    with pytest.raises(ConfigError, match=r"mine.yaml is a file; give the folder of a run, runs/of-mine, once"):
        probe_batch(str(tmp_path / "mine.yaml"), ProbeOptions())
    (tmp_path / "notes.txt").write_text("a: [")
    with pytest.raises(ConfigError, match=r"notes.txt is a file; give the folder of a run, or one of its checkpoints"):
        probe_batch(str(tmp_path / "notes.txt"), ProbeOptions())


def test_a_run_of_a_program_of_ones_own_is_refused(tmp_path: Path) -> None:
    train, _ = digits()
    fit(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        train, growth=constant(8), budget=budget(steps=2), run=RunSpec(dir=str(tmp_path / "run")),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="has no task: the run was started by fit"):
        probe_batch(str(tmp_path / "run"), ProbeOptions())
