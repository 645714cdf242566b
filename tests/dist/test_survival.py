"""Faults injected by name cost time and gradients that are computed again, nothing else."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, Commands, deadly, events, ledger, parameters, wounded

pytestmark = pytest.mark.fault

OFTEN = "run.checkpoint={every_steps: 7, keep: 3}"
GROUP = ("launch.workers=2", "launch.backoff_s=0", OFTEN)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that no fault has touched."""
    commands = wounded(Commands(tmp_path_factory.mktemp("undisturbed")))
    assert commands.train("run", *deadly("in forward", commands.folder / "never", who=9), *GROUP).code == 0
    return commands.folder / "run"


def assert_nothing_was_lost(run: Path, undisturbed: Path) -> None:
    assert (parameters(run) == parameters(undisturbed)).all()
    assert {**ledger(run), "replayed": 0} == ledger(undisturbed)
    assert (
        ledger(run)["replayed"] <= 2 * (2 * 7 + 1) * 32
    )  # two deaths; an interval, one while it is written, an update


@pytest.mark.parametrize(
    ("fault", "who", "after", "failures"),
    [
        ("in the all-reduce", 1, 20, 1),
        ("during a checkpoint", 0, 12, 1),
        pytest.param("in forward", 1, 20, 1, marks=pytest.mark.slow),
        pytest.param("in the all-reduce", 0, 20, 1, marks=pytest.mark.slow),
        pytest.param("at a growth transition", 1, 0, 1, marks=pytest.mark.slow),
        pytest.param("during resume", 1, 20, 2, marks=pytest.mark.slow),
    ],
)
def test_a_worker_killed_anywhere_is_replaced_and_nothing_is_lost(
    fault: str, who: int, after: int, failures: int, distgrow: Commands, undisturbed: Path
) -> None:
    mark = distgrow.folder / "happened"
    task = deadly(fault, mark, who, after)
    finished = wounded(distgrow).train("run", *task, *GROUP, f"launch.max_failures={failures}")
    assert finished.code == 0, finished.err
    assert mark.exists()
    run = distgrow.folder / "run"
    assert_nothing_was_lost(run, undisturbed)
    assert len(events(run, "resume")) == 1  # of two deaths, the second is before the run goes on


@pytest.mark.slow
def test_without_a_failure_allowed_the_run_ends_and_can_be_resumed(distgrow: Commands, undisturbed: Path) -> None:
    task = deadly("in forward", distgrow.folder / "happened")
    assert wounded(distgrow).train("run", *task, *GROUP).code == 1
    assert distgrow.train("run", *task, *GROUP, resume=True).code == 0
    assert_nothing_was_lost(distgrow.folder / "run", undisturbed)


def test_storage_that_fails_once_is_asked_again(distgrow: Commands, undisturbed: Path) -> None:
    mark = distgrow.folder / "happened"
    assert wounded(distgrow).train("run", *deadly("storage fails once", mark, who=0), *GROUP).code == 0
    assert mark.exists()
    run = distgrow.folder / "run"
    assert_nothing_was_lost(run, undisturbed)
    assert not events(run, "resume")


def test_training_goes_on_while_a_checkpoint_is_written(distgrow: Commands, undisturbed: Path) -> None:
    task = deadly("slow storage", distgrow.folder / "never", after=40)
    assert wounded(distgrow).train("run", *task, *GROUP, "run.checkpoint.every_steps=25").code == 0
    run = distgrow.folder / "run"
    assert (parameters(run) == parameters(undisturbed)).all()
    written = written_behind(run)
    assert [line["step"] for line, _ in written] == [25, 50, 75, 85]
    for line, reached in written[:2]:  # the end of the run waits for the others
        assert line["seconds"] > 0.3  # three files
        assert line["stall_s"] < line["seconds"] - 0.3
        assert reached > line["step"]


def test_storage_slower_than_the_checkpoint_interval_is_waited_for(distgrow: Commands, undisturbed: Path) -> None:
    task = deadly("slow storage", distgrow.folder / "never", after=0)
    assert wounded(distgrow).train("run", *task, *GROUP).code == 0
    assert (parameters(distgrow.folder / "run") == parameters(undisturbed)).all()
    written = written_behind(distgrow.folder / "run")
    assert len(written) >= 10
    assert all(line["step"] < reached <= line["step"] + 7 + 1 for line, reached in written[:-1])


def written_behind(run: Path) -> list[tuple[dict[str, Any], int]]:
    """The checkpoints after the first one, each with the step that training had come to when it was whole."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    places = [k for k, line in enumerate(lines) if line["event"] == "checkpoint" and line["step"]]
    return [(lines[k], max(line["step"] for line in lines[:k])) for k in places]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_replaced(distgrow: Commands, undisturbed: Path) -> None:
    mark = distgrow.folder / "happened"
    task = deadly("hangs", mark, after=20)
    finished = wounded(distgrow).train("run", *task, *GROUP, "launch.timeout_s=3", "launch.max_failures=1")
    assert finished.code == 0, finished.err
    assert mark.exists()
    assert re.search(
        r"distgrow: rank 1 stayed away: it is at wounded.py:\d+, in look. Rank 0 of 2 waited", finished.err
    )
    assert "Traceback" not in finished.err
    assert_nothing_was_lost(distgrow.folder / "run", undisturbed)


def test_each_further_failure_without_a_new_checkpoint_waits_twice_as_long(tmp_path: Path) -> None:
    from distgrow.checkpoint.manager import failures
    from distgrow.tracking.events import KINDS

    def found(*kinds: str) -> int:
        place = {"step": 0, "samples": 0, "time_s": 0.0, "reason": "done"}
        return failures(KINDS[kind].from_json({"event": kind, **place}) for kind in kinds)

    assert found() == found("start", "end") == 0
    assert found("start", "eval") == found("start", "checkpoint", "eval") == 1
    assert found("start", "resume", "eval", "resume") == 3
    assert found("start", "resume", "resume", "checkpoint", "resume") == 2


def test_a_folder_that_holds_a_run_is_refused_before_any_worker_starts(distgrow: Commands, undisturbed: Path) -> None:
    task = deadly("in forward", distgrow.folder / "happened")
    again = wounded(distgrow).train(str(undisturbed), *task, *GROUP, "launch.max_failures=3")
    assert again.code == 2
    assert "exists already and is never overwritten" in again.err


def test_who_touches_the_file_gets_a_checkpoint_and_the_run_goes_on(distgrow: Commands) -> None:
    (distgrow.folder / "gated.py").write_text((ROOT / "tests/ray/gated.py").read_text())
    gate, run = distgrow.folder / "gate", distgrow.folder / "run"
    gated = f"task={{kind: target, target: 'gated:make', args: {{gate: '{gate}', pause_s: 0.03}}}}"
    config = str(ROOT / "configs/digits.yaml")
    rarely = "run.checkpoint={every_s: 3600, keep: 9}"
    process = distgrow.start("train", config, *TINY, gated, "model=null", rarely, f"run.dir={run}")
    deadline = time.monotonic() + 240
    while not gate.with_name("gate.0").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (run / ".checkpoint").touch()
    gate.touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    first, asked, last = [event["step"] for event in events(run, "checkpoint")]
    assert first == 0 and 20 <= asked < last == 85
