"""The runs that the benchmark of `what-if` makes: every schedule that it compares, on three tasks of digits.

A run is made once: a folder that holds an ended run is left as it is. Whatever schedule a run has, it is evaluated at
the same samples, on the training set and on the test set.
"""

import contextlib
import io
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from sfo_tasks import noisy_digits

from distgrow import SGD, AdamW, RunSpec, budget, fit
from distgrow.core.lr import LR
from distgrow.optim import OptimizerSpec
from distgrow.planning.what_if.candidates import Setting
from distgrow.report.runs import read
from distgrow.tasks.builtin import Digits
from distgrow.tasks.task import Task
from distgrow.training.spec import Evaluation

START, EVALUATIONS, SEEDS = 16, 40, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Hold a task and what all of its schedules have in common."""

    task: Callable[[], Task]
    optimizer: OptimizerSpec
    lr: float
    epochs: int

    def setting(self) -> Setting:
        """Return what the schedules share, as what-if has it."""
        epoch = len(self.task().train)
        samples = epoch * self.epochs
        return Setting(start=START, cap=epoch // 4, lr=LR(base=self.lr), samples=samples, epoch=epoch)

    def names(self) -> list[str]:
        """Return the schedules but `optimal`, whose hundred updates are too few for a fit."""
        return [name for name in self.setting().all() if name != "optimal"]


PROBLEMS: Mapping[str, Problem] = {
    "softmax": Problem(task=noisy_digits, optimizer=SGD(), lr=0.5, epochs=20),
    "mlp": Problem(task=lambda: Digits().build(None), optimizer=SGD(), lr=0.05, epochs=20),
    "mlp-adamw": Problem(task=lambda: Digits().build(None), optimizer=AdamW(), lr=0.001, epochs=8),
}


def make(problem: str, name: str, seed: int, folder: Path, epochs: int | None = None) -> None:
    """Train one schedule, unless its folder holds that run; for `epochs` in place of the problem's."""
    if ended(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    own = PROBLEMS[problem] if epochs is None else replace(PROBLEMS[problem], epochs=epochs)
    task, setting = own.task(), own.setting()
    schedule = setting.controller(setting.all()[name])
    given: dict[str, Any] = {"growth": schedule.growth, "stages": schedule.stages, "lr": schedule.lr}
    every = Evaluation(every_samples=setting.samples // EVALUATIONS)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        fit(
            task.model, task.loss, task.train, **given, test={"train": task.train, "test": task.test},
            metrics=task.metrics, optimizer=own.optimizer, budget=budget(samples=setting.samples),
            run=RunSpec(dir=str(folder), seed=seed, eval=every),
        )  # fmt: skip


def ended(folder: Path) -> bool:
    """Return whether a folder holds a run that has ended."""
    return (folder / "metrics.jsonl").is_file() and (folder / "config.yaml").is_file() and read([str(folder)])[0].ended


def make_all(into: Path) -> None:
    """Make every run that is not there, two at a time: into/TASK/SCHEDULE/SEED."""
    jobs = [
        (problem, name, seed, into / problem / name / str(seed))
        for problem, own in PROBLEMS.items()
        for name in own.names()
        for seed in range(SEEDS)
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(make, *zip(*jobs, strict=True)))


def make_few(into: Path) -> None:
    """Make a few short runs, for a smoke run."""
    for name in ("constant", "linear-decay", "cosine", "wsd50", "wsd80", "matched"):
        make("softmax", name, 0, into / "softmax" / name / "0", epochs=5)
