"""A worker that is killed costs time and replayed gradients, nothing else."""

from pathlib import Path

import pytest
from conftest import Commands, events, ledger, parameters

MORTAL = Path(__file__).with_name("mortal.py")
OFTEN = "run.checkpoint={every_steps: 7, keep: 3}"


@pytest.fixture
def mortal(distgrow: Commands) -> Commands:
    """Commands that find the mortal task."""
    (distgrow.folder / "mortal.py").write_text(MORTAL.read_text())
    (distgrow.folder / "undisturbed").touch()
    return distgrow


def task(mark: str) -> tuple[str, ...]:
    return (f"task={{kind: target, target: 'mortal:make', args: {{mark: '{mark}'}}}}", "model=null", OFTEN)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(mortal: Commands) -> None:
    marks = [str(mortal.folder / name) for name in ("undisturbed", "died")]
    assert mortal.train("whole", *task(marks[0]), "launch.workers=2").code == 0
    assert mortal.train("killed", *task(marks[1]), "launch.workers=2", "launch.max_failures=1").code == 0
    assert (mortal.folder / "died").exists()
    assert (parameters(mortal.folder / "killed") == parameters(mortal.folder / "whole")).all()
    undisturbed, resumed = ledger(mortal.folder / "whole"), ledger(mortal.folder / "killed")
    assert {**resumed, "replayed": 0} == undisturbed
    assert len(events(mortal.folder / "killed", "resume")) == 1


def test_without_a_failure_allowed_the_run_ends_and_can_be_resumed(mortal: Commands) -> None:
    mark = str(mortal.folder / "died")
    assert mortal.train("run", *task(mark), "launch.workers=2").code == 1
    assert mortal.train("run", *task(mark), "launch.workers=2", resume=True).code == 0
    assert ledger(mortal.folder / "run")["applied"] == 1500


def test_a_folder_that_holds_a_run_is_refused_before_any_worker_starts(mortal: Commands) -> None:
    mark = str(mortal.folder / "undisturbed")
    assert mortal.train("run", *task(mark), "launch.workers=2").code == 0
    again = mortal.train("run", *task(mark), "launch.workers=2", "launch.max_failures=3")
    assert again.code == 2
    assert "exists already and is never overwritten" in again.err
