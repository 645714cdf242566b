"""A run whose stages have groups of ranks of their own is the run of one group, whatever happens between two groups."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Commands, deadly, events, ledger, parameters, wounded
from test_resume import kill_group, until_step
from test_worlds import spied, spy_package

pytestmark = pytest.mark.fault

RANGE = ("launch.workers=[1, 4]", "engine.max_micro=8")  # batches of 8, 16 and 32
DOUBLE = ("engine.precision=float64", "run.checkpoint={every_steps: 7, keep: 3}")


def changes(run: Path) -> list[tuple[int, int, int]]:
    """(old, new, wanted) of every resize."""
    return [(event["old"], event["new"], event["wanted"]) for event in events(run, "resize")]


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs end with the same parameters to float64's tolerance, and the same ledger but for replays."""
    apart = (parameters(one) - parameters(other)).norm()
    return bool(apart <= 1e-10 * parameters(one).norm()) and {**ledger(other), "replayed": 0} == ledger(one)


@pytest.fixture
def whole(distgrow: Commands) -> Path:
    """The run in one process."""
    assert distgrow.train("whole", *DOUBLE).code == 0
    return distgrow.folder / "whole"


def start(distgrow: Commands, *overrides: str, resume: bool = False) -> "subprocess.Popen[str]":
    words = ["train", str(ROOT / "configs/digits.yaml"), *TINY, "run.dir=run", *DOUBLE, *overrides]
    return distgrow.start(*words, *["--resume"] * resume)


def until(true: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Wait until something holds, at most a minute, or the process has ended."""
    deadline = time.monotonic() + 240
    while not true() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def test_a_run_that_grows_its_workers_takes_the_samples_and_ends_with_the_parameters_of_a_fixed_one(
    distgrow: Commands,
) -> None:
    spy_package(distgrow.folder)
    whole = ("budget={samples: 1500}",)
    consumed = spied(distgrow, "fixed", *whole)
    assert spied(distgrow, "grown", *whole, *RANGE) == consumed
    fixed, grown = distgrow.folder / "fixed", distgrow.folder / "grown"
    assert same_run(fixed, grown)
    assert ledger(grown) == ledger(fixed)
    assert changes(grown) == [(1, 2, 2), (2, 4, 4)]
    shapes = {(step["stage"], step["batch"], step["world"], step["micro"]) for step in events(grown, "step")}
    assert {shape for shape in shapes if shape[0] < 2} == {(0, 8, 1, 8), (1, 16, 2, 8)}
    assert {shape[2] for shape in shapes if shape[0] == 2} == {4}
    assert [step["step"] for step in events(grown, "step")] == [step["step"] for step in events(fixed, "step")]
    assert len(events(grown, "end")) == 1
    assert not list(grown.glob(".resize*"))


@pytest.mark.slow
def test_the_seconds_of_a_resize_are_those_between_two_updates_and_the_runs_own(distgrow: Commands) -> None:
    assert distgrow.train("run", "launch.workers={0: 2, 1: 1, 2: 3}", "run.loader.workers=1").code == 0
    run = distgrow.folder / "run"
    assert changes(run) == [(2, 1, 1), (1, 3, 3)]
    for resize in events(run, "resize"):
        last = max(step["time_s"] for step in events(run, "step") if step["step"] <= resize["step"])
        first = min(step["time_s"] for step in events(run, "step") if step["step"] > resize["step"])
        assert 0 < resize["seconds"] <= first - last < resize["seconds"] + 5
    times = [step["time_s"] for step in events(run, "step")]
    assert times == sorted(times)


@pytest.mark.slow
def test_killed_in_the_second_group_and_in_a_hand_over_it_is_resumed_with_the_size_that_its_stage_wants(
    distgrow: Commands, whole: Path
) -> None:
    run = distgrow.folder / "run"
    process = start(distgrow, *RANGE)
    until_step(run, 45, process)
    kill_group(process)
    time.sleep(0.5)
    before = len(events(run, "step"))
    process = start(distgrow, *RANGE, resume=True)
    until(lambda: any(run.glob(".resize-*ed")), process)
    kill_group(process)
    time.sleep(0.5)
    assert {step["world"] for step in events(run, "step")[before:]} == {2}
    before = len(events(run, "step"))
    assert distgrow.train("run", *RANGE, *DOUBLE, resume=True).code == 0
    assert {step["world"] for step in events(run, "step")[before:]} == {4}
    assert same_run(whole, run)
    assert changes(run) == [(1, 2, 2)]  # the other hand-over was never answered


@pytest.mark.slow
@pytest.mark.parametrize("at", [".resize-asked", ".resize-taken"])
def test_sigterm_in_a_hand_over_is_exit_code_0_and_nothing_is_lost(distgrow: Commands, whole: Path, at: str) -> None:
    run = distgrow.folder / "run"
    process = start(distgrow, *RANGE)
    until((run / at).exists, process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert distgrow.train("run", *RANGE, *DOUBLE, resume=True).code == 0
    assert same_run(whole, run)
    assert ledger(run) == ledger(whole)


@pytest.mark.slow
def test_a_request_that_is_damaged_costs_its_event_and_nothing_else(distgrow: Commands, whole: Path) -> None:
    run = distgrow.folder / "run"
    process = start(distgrow, *RANGE)
    until((run / ".resize-asked").exists, process)
    for name in (".resize-asked", ".resize-taken"):
        if (run / name).exists():
            (run / name).write_text('{"old": 1, "asked')
    process.communicate(timeout=100)
    assert process.returncode == 0
    assert changes(run)[-1] == (2, 4, 4)
    assert same_run(whole, run)


@pytest.mark.slow
def test_a_rank_that_dies_in_a_later_group_is_replaced_in_a_group_of_that_size(distgrow: Commands) -> None:
    task = deadly("in forward", distgrow.folder / "died", after=5)
    killed = wounded(distgrow).train("killed", *task, *DOUBLE, "launch.workers={0: 1, 1: 2}", "launch.max_failures=1")
    assert killed.code == 0, killed.err
    assert (distgrow.folder / "died").exists()  # only a group of two has the rank that dies
    assert distgrow.train("whole", *task, *DOUBLE, workers=2).code == 0
    assert same_run(distgrow.folder / "whole", distgrow.folder / "killed")
    assert changes(distgrow.folder / "killed") == [(1, 2, 2)]
    assert len(events(distgrow.folder / "killed", "resume")) == 2


@pytest.mark.slow
def test_a_group_that_fails_for_good_ends_the_run_with_its_error(distgrow: Commands) -> None:
    task = deadly("in forward", distgrow.folder / "died", after=5)
    assert wounded(distgrow).train("run", *task, "launch.workers={0: 1, 1: 2}").code == 1
    assert {step["world"] for step in events(distgrow.folder / "run", "step")} == {1, 2}


@pytest.mark.slow
def test_a_second_command_on_the_run_is_refused_also_between_two_groups(distgrow: Commands) -> None:
    process = start(distgrow, *RANGE)
    until(lambda: any((distgrow.folder / "run").glob(".resize-*ed")), process)
    refused = distgrow.train("run", *RANGE, *DOUBLE, resume=True)
    process.communicate(timeout=100)
    assert (refused.code, process.returncode) == (2, 0)
    assert "is being trained by another command" in refused.err
    assert changes(distgrow.folder / "run") == [(1, 2, 2), (2, 4, 4)]


@pytest.mark.slow
def test_a_damaged_checkpoint_at_a_boundary_costs_its_stage_and_no_more(distgrow: Commands, whole: Path) -> None:
    run = distgrow.folder / "run"
    process = start(distgrow, *RANGE)
    until_step(run, 50, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    for newest in sorted((run / "checkpoints").iterdir())[-2:]:  # back into the stage of one rank
        (newest / "engine.pt").write_bytes(b"")
    assert process.returncode == 0
    assert distgrow.train("run", *RANGE, *DOUBLE, resume=True).code == 0
    assert same_run(whole, run)


def test_a_range_is_no_matter_to_a_group_that_torchrun_has_made(distgrow: Commands) -> None:
    assert distgrow.train("run", *RANGE, workers=2).code == 0
    assert {step["world"] for step in events(distgrow.folder / "run", "step")} == {2}
    assert not events(distgrow.folder / "run", "resize")
    assert [path.name for path in distgrow.folder.iterdir()] == ["run"]
