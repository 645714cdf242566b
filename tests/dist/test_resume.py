"""Runs that are killed, stopped, damaged and resumed end as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Commands, events, ledger, parameters, torchrun

OFTEN = "run.checkpoint.every_steps=7"


def kill_group(process: "subprocess.Popen[str]") -> None:
    """SIGKILL a process and all its children."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    for pid in [*map(int, children.stdout.split()), process.pid]:
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def until_step(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    """Wait until a run has logged a step."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("workers", "task"),
    [
        (1, ("optimizer={kind: sgd, momentum: 0.9, nesterov: true, clip: 1.0}",)),
        pytest.param(
            1,
            ("model={kind: resnet8, norm: batch}", "budget={samples: 600}", "optimizer={kind: adamw}", "lr.base=0.01"),
            marks=pytest.mark.slow,
        ),
        (3, ("model={kind: resnet8, norm: batch}", "budget={samples: 600}", "growth.start=9")),
    ],
)
def test_killed_at_random_steps_and_resumed_it_ends_bit_identical(
    distgrow: Commands, workers: int, task: tuple[str, ...]
) -> None:
    assert distgrow.train("whole", OFTEN, *task, workers=workers).code == 0
    run = distgrow.folder / "killed"
    words = ["train", str(ROOT / "configs/digits.yaml"), *TINY, "run.dir=killed", OFTEN, *task]
    last = events(distgrow.folder / "whole", "end")[0]["step"]
    for attempt, step in enumerate(sorted(random.Random(workers).sample(range(8, last), 2))):
        process = distgrow.start(*words, *["--resume"] * (attempt > 0), module=torchrun(workers))
        until_step(run, step, process)
        kill_group(process)
    time.sleep(0.5)
    assert distgrow.train("killed", OFTEN, *task, resume=True, workers=workers).code == 0
    assert (parameters(run) == parameters(distgrow.folder / "whole")).all()
    undisturbed, resumed = ledger(distgrow.folder / "whole"), ledger(run)
    assert {**resumed, "replayed": 0} == undisturbed
    assert resumed["replayed"] <= 2 * (2 * 7 + 1) * 32  # two deaths; one interval, one while it is written, one update


def test_a_run_goes_on_with_another_world_size(distgrow: Commands) -> None:
    double = "engine.precision=float64"
    assert distgrow.train("whole", double).code == 0
    assert distgrow.train("moved", double, "budget={samples: 1500}", OFTEN, workers=2).code == 0
    for newest in sorted((distgrow.folder / "moved/checkpoints").iterdir())[1:]:
        subprocess.run(["rm", "-r", str(newest)], check=True)  # as if it had stopped earlier
    assert distgrow.train("moved", double, OFTEN, "engine.max_micro=5", resume=True, workers=3).code == 0
    one, moved = parameters(distgrow.folder / "whole"), parameters(distgrow.folder / "moved")
    assert (one - moved).norm() <= 1e-10 * one.norm()
    assert ledger(distgrow.folder / "moved")["applied"] == 1500


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sigterm_is_a_checkpoint_and_exit_code_0(distgrow: Commands, workers: int) -> None:
    assert distgrow.train("whole").code == 0
    words = ["train", str(ROOT / "configs/digits.yaml"), *TINY, "run.dir=stopped", f"launch.workers={workers}"]
    distgrow.warm = False  # how a process that a user has started takes a signal
    process = distgrow.start(*words)
    until_step(distgrow.folder / "stopped", 20, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    stopped = events(distgrow.folder / "stopped", "end")[0]
    assert stopped["reason"] == "stopped on request"
    assert events(distgrow.folder / "stopped", "checkpoint")[-1]["step"] == stopped["step"]
    assert distgrow.train("stopped", resume=True, workers=workers).code == 0
    assert ledger(distgrow.folder / "stopped") == ledger(distgrow.folder / "whole")  # nothing was done twice
    if workers == 1:
        assert (parameters(distgrow.folder / "stopped") == parameters(distgrow.folder / "whole")).all()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_anything_is_saved_is_no_success(distgrow: Commands, sent: signal.Signals, code: int) -> None:
    (distgrow.folder / "slow.py").write_text(
        """
import os, pathlib, time
if "RANK" in os.environ:
    pathlib.Path("loading").touch()
    time.sleep(60)
def make():
    from torch import nn
    return nn.Linear(2, 1), lambda model, batch: model(batch).mean(), [[0.0, 1.0]] * 50
"""
    )
    task = ("task={kind: target, target: 'slow:make'}", "model=null", "launch.workers=2")
    words = ["train", str(ROOT / "configs/digits.yaml"), *TINY, "run.dir=run", *task]
    process = distgrow.start(*words, module=("distgrow",))
    deadline = time.monotonic() + 240
    while not (distgrow.folder / "loading").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert not (distgrow.folder / "run").exists()


def test_a_damaged_checkpoint_is_named_and_the_newest_intact_one_used(distgrow: Commands) -> None:
    assert distgrow.train("run", "run.checkpoint={every_steps: 20, keep: 3}").code == 0
    newest = max((distgrow.folder / "run/checkpoints").iterdir())
    (newest / "engine.pt").write_bytes((newest / "engine.pt").read_bytes()[:-100])
    before = (distgrow.folder / "run/metrics.jsonl").read_text().count("\n")
    finished = distgrow.train("run", "run.checkpoint={every_steps: 20, keep: 3}", resume=True)
    assert finished.code == 0
    assert str(newest.name) in finished.err
    assert "damaged" in finished.err
    lines = (distgrow.folder / "run/metrics.jsonl").read_text().splitlines()[before:]
    resumed = next(json.loads(line) for line in lines if '"resume"' in line)
    assert resumed["step"] < int(newest.name.removeprefix("step-"))
    assert ledger(distgrow.folder / "run")["applied"] == 1500


def test_without_an_intact_checkpoint_resume_says_so(distgrow: Commands) -> None:
    assert distgrow.train("run").code == 0
    for manifest in distgrow.folder.glob("run/checkpoints/*/manifest.json"):
        manifest.unlink()
    finished = distgrow.train("run", resume=True)
    assert finished.code == 2
    assert "no intact checkpoint" in finished.err
    assert "Traceback" not in finished.err


def test_as_many_checkpoints_are_kept_as_asked(distgrow: Commands) -> None:
    assert distgrow.train("run", "run.checkpoint={every_steps: 3, keep: 2}").code == 0
    assert len(list((distgrow.folder / "run/checkpoints").iterdir())) == 2


def test_a_full_disk_leaves_the_previous_checkpoint_good(distgrow: Commands) -> None:
    small = distgrow.folder / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        finished = distgrow.train("small/run", "run.checkpoint={every_steps: 5, keep: 3}", "run.log_every=1000")
        assert finished.code == 2, finished.err
        assert "No space left" in finished.err
        assert "Traceback" not in finished.err
        kept = list((small / "run/checkpoints").iterdir())
        assert kept
        assert all(path.name.startswith("step-") for path in kept)
        subprocess.run(["mount", "-o", "remount,size=10m", str(small)], check=True)
        assert distgrow.train("small/run", resume=True).code == 0
        assert ledger(small / "run")["applied"] == 1500
    finally:
        subprocess.run(["umount", str(small)], check=True)
