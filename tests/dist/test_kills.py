"""A run that is killed anywhere and resumed is the run that was never stopped."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from conftest import ROOT
from torch import nn

import distgrow
from distgrow.checkpoint.spec import Checkpointing

CASES = ("momentum", "adamw", "auto", "noise", "norm", "memory", "workers")


def killed(folder: Path, case: str, *, points: int, seed: int) -> None:
    command = [sys.executable, str(ROOT / "tests/dist/killed.py"), str(folder), case, str(points), str(seed)]
    finished = warm.run(command, {**os.environ, "OMP_NUM_THREADS": "1"}, timeout_s=550)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.fault
@pytest.mark.parametrize("case", ["norm", pytest.param("adamw", marks=pytest.mark.slow)])
def test_killed_at_the_points_that_matter_it_ends_bit_identical(case: str, tmp_path: Path) -> None:
    killed(tmp_path, case, points=9, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_points_it_ends_bit_identical(case: str, tmp_path: Path) -> None:
    killed(tmp_path, case, points=25, seed=CASES.index(case))


def test_trackers_are_flushed_with_all_lines_before_a_checkpoint_before_it_is_one(tmp_path: Path) -> None:
    class Keeps:
        """A tracker that keeps lines in memory until it is flushed."""

        logged, written = 0, -1

        def log(self, event: Mapping[str, Any]) -> None:
            if event["event"] == "step":
                self.logged = event["step"]
            if event["event"] == "checkpoint":
                assert self.written >= event["step"]

        def flush(self) -> None:
            assert not (tmp_path / f"run/checkpoints/step-{self.logged:08d}").exists()
            self.written = self.logged

        def close(self) -> None:
            assert self.written == 9

    distgrow.fit(
        nn.Linear(3, 1),
        lambda model, batch: model(batch).pow(2).mean(),
        torch.randn(40, 3),
        growth=distgrow.constant(4),
        budget=distgrow.budget(steps=9),
        lr=distgrow.constant_lr(0.01),
        run=distgrow.RunSpec(dir=str(tmp_path / "run"), checkpoint=Checkpointing(every_steps=2, keep=9)),
        trackers=[Keeps()],
    )


CTRL_C = """
import os, signal, sys
import torch
from torch import nn
import distgrow
signal.signal(signal.SIGINT, signal.default_int_handler)

class Press:
    def log(self, event):
        if event["event"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)
    def close(self):
        pass

torch.manual_seed(0)
fit = dict(growth=distgrow.constant(4), budget=distgrow.budget(steps=9), lr=distgrow.constant_lr(0.01))
again = "again" in sys.argv
distgrow.fit(nn.Linear(3, 1), lambda model, batch: model(batch).pow(2).mean(), torch.randn(40, 3), **fit,
             run=distgrow.RunSpec(dir="run"), resume=again, trackers=[] if again else [Press()])
"""


def test_ctrl_c_in_fit_saves_says_how_to_go_on_and_exits_130(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(CTRL_C)
    shell = f"'{sys.executable}' script.py; echo exit $?; '{sys.executable}' script.py again; echo exit $?"
    finished = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=120
    )
    assert finished.stdout.split() == ["exit", "130", "exit", "0"], finished.stderr
    assert "resume=True" in finished.stderr and "resumed from step-00000006" in finished.stderr
