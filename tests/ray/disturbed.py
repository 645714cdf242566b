"""One run for the tests of faults on Ray clusters: how it is started, where it waits, how it must end."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

from conftest import ROOT, TINY, Commands, events, ledger, parameters
from hosts import Hosts

HERE = Path(__file__).parent


def undisturbed_run(folder: Path, *others: str) -> Path:
    """The run of two ranks under torchrun that nothing happens to."""
    commands = Commands(folder)
    commands.environment["PYTHONPATH"] = str(HERE)
    gate = commands.folder / "gate"
    gate.touch()
    assert commands.train("run", *gated(gate), *others, workers=2).code == 0
    return commands.folder / "run"


def gated(gate: Path) -> tuple[str, ...]:
    """The digits, tiny, with a gate before the 20th update."""
    task = f"task={{kind: target, target: 'gated:make', args: {{gate: '{gate}'}}}}"
    return (task, "model=null", "run.checkpoint={every_steps: 7, keep: 3}")


def words(folder: Path, *others: str) -> list[str]:
    """The run of these tests as a command."""
    config = [str(ROOT / "configs/digits.yaml"), *TINY, *gated(folder / "gate"), f"run.dir={folder / 'run'}"]
    return [sys.executable, str(ROOT / "launch/ray_train.py"), *config, "launch.workers=2", *others]


def start(cluster: Hosts, folder: Path, *others: str) -> "Popen[bytes]":
    """The run, started on the head; its output is in the file `log`."""
    return cluster.start(1, *words(folder, *others), log=folder / "log", PYTHONPATH=str(HERE))


def until(happened: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for something to happen."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"in vain for {seconds} s: {what}"
        time.sleep(0.1)


def ranks_at_gate(cluster: Hosts, folder: Path) -> list[int]:
    """The process of every rank of the run in `folder`, once all of them wait at its gate."""
    marks = [folder / f"gate.{rank}" for rank in range(2)]
    try:
        until(lambda: all(mark.exists() and mark.read_text() for mark in marks), 300, "both ranks at the gate")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{(folder / 'log').read_text()}\n{cluster.complaints()}") from None
    return [int(mark.read_text()) for mark in marks]


def assert_same(run: Path, undisturbed: Path) -> None:
    """The run went on once, and ended as if nothing had happened but work done twice."""
    assert_resumed(run, undisturbed)
    assert (parameters(run) == parameters(undisturbed)).all()


def assert_resumed(run: Path, undisturbed: Path) -> None:
    """The run went on once, and counts as if nothing had happened but work done twice."""
    assert len(events(run, "resume")) == 1
    assert [end["reason"] for end in events(run, "end")] == ["done"]
    assert ledger(run)["replayed"] > 0
    assert {**ledger(run), "replayed": 0} == ledger(undisturbed)
    resumed = events(run, "resume")[0]["step"]
    steps = [step["step"] for step in events(run, "step")]
    before = steps[: len(steps) - (steps[-1] - resumed)]
    assert steps == [*before, *range(resumed + 1, steps[-1] + 1)]  # nobody else has written there since the resume
    assert before == [*range(1, len(before) + 1)]
