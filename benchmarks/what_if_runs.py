"""The runs that the benchmark of `what-if` makes: every schedule that it compares, on three tasks of digits.

A run is made once: a folder that holds an ended run is left as it is. Whatever schedule a run has, it is evaluated at
the same samples, on the training set and on the test set.
"""

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from sfo_tasks import noisy_digits

from distgrow import SGD, AdamW, RunSpec, budget, fit
from distgrow.core.lr import LR
from distgrow.core.stages import Stages
from distgrow.optim import OptimizerSpec
from distgrow.planning.what_if.candidates import Setting
from distgrow.report.runs import read
from distgrow.tasks.builtin import Digits
from distgrow.tasks.task import Task
from distgrow.training.spec import Evaluation

START, EVALUATIONS = 16, 40


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


PROBLEMS: Mapping[str, Problem] = {
    "softmax": Problem(task=noisy_digits, optimizer=SGD(), lr=0.5, epochs=20),
    "mlp": Problem(task=lambda: Digits().build(None), optimizer=SGD(), lr=0.05, epochs=20),
    "mlp-adamw": Problem(task=lambda: Digits().build(None), optimizer=AdamW(), lr=0.001, epochs=8),
}


def make(problem: str, name: str, seed: int, folder: Path) -> None:
    """Train one schedule, unless its folder holds that run."""
    if ended(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    own = PROBLEMS[problem]
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


def cells(into: Path, seeds: int, *, quick: bool) -> Iterator[tuple[str, str, int, Path]]:
    """Yield the problem, the schedule, the seed and the folder of every run."""
    for problem, own in PROBLEMS.items():
        for name in own.setting().all():
            if not quick or name in ("constant", "wsd50", "cosine", "matched", "late", "wsd80", "linear-decay"):
                yield from ((problem, name, seed, into / problem / name / str(seed)) for seed in range(seeds))


def make_all(into: Path, seeds: int, *, quick: bool) -> None:
    """Make every run that is not there, two at a time."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(make, *zip(*cells(into, seeds, quick=quick), strict=True)))
