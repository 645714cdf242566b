"""Runs of the SFO benchmark through distgrow's own fit(), with exact ‖∇f‖ at places of the samples axis.

What is measured here is charged to nobody: only what a policy itself asks for is in its ledger.
"""

import io
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sfo_results import Course, Reading
from torch import Tensor, nn

from distgrow.checkpoint.spec import Checkpointing
from distgrow.config.run import Run
from distgrow.core.errors import TrainingFailed
from distgrow.data.stream import evaluation_batches
from distgrow.distributed.world import World
from distgrow.engine.batches import place
from distgrow.tasks.task import Task
from distgrow.tracking.base import Tracker
from distgrow.tracking.base_event import Line
from distgrow.training.fit import fit
from distgrow.training.result import Result

PATIENCE, LEAST = (
    3,
    20,
)  #: times its samples at the last new minimum, and epochs, after which a constant is at its floor
TOO_FAR = 1e6  #: ‖∇f‖ of a run that diverges


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where on the samples axis a run is looked at: ever wider apart, by a share of what lies behind."""

    first: float  #: epochs between two of them at the beginning
    wider: float = 0.0  #: share of the samples so far, where that is more

    def after(self, samples: int, epoch: int) -> float:
        """Return the next place, samples."""
        return samples + max(self.first * epoch, self.wider * samples)


class Ended(Exception):
    """The run has reached its last target."""


class Watch:
    """A tracker that measures the model itself."""

    def __init__(
        self,
        look: Callable[[], Reading],
        course: Course,
        places: Places,
        epoch: int,
        stop_at: float | None,
        still: bool,
    ) -> None:
        self._look, self._course, self._places, self._epoch, self._stop_at = look, course, places, epoch, stop_at
        self._still = still  # nothing about the schedule will change
        self._next, self._seen = places.after(0, epoch), -1

    def log(self, event: Line) -> None:
        """Count updates; look where a place has been passed, and at the end."""
        if event["event"] == "step":
            rate = event["samples_per_s"]
            self._course.updated(event["batch"], seconds=event["batch"] / rate if rate else None)
            if event["samples"] >= self._next:
                self._next = self._places.after(event["samples"], self._epoch)
                self._read(event)
        elif event["event"] == "end" and self._seen != event["step"]:
            self._read(event)

    def close(self) -> None:
        """Do nothing: no file is open."""

    def _read(self, event: Line) -> None:
        self._seen = event["step"]
        reading = self._look()
        self._course.read(event["sfo"], reading)
        if not reading.finite or reading.grad_norm > TOO_FAR:
            raise Ended("diverged")
        if self._course.reached(self._stop_at):
            raise Ended("arrived")
        if self._still and event["sfo"] > max(PATIENCE * self._course.grad_norm.points[-1][1], LEAST * self._epoch):
            raise Ended("at its floor")


def play(run: Run, seed: int, course: Course, stop_at: float | None, *, places: Places) -> tuple[int, str]:
    """One run, its parameters, order and augmentation from `seed`: samples of an epoch, and how it ended."""
    torch.manual_seed(seed)
    task = run.task.build(run.model)
    penalty = run.optimizer.penalty
    still = stop_at is not None and run.growth.kind == "constant" and run.lr.decay.kind == "none"
    watch = Watch(looking(task, penalty, run.run.eval.rows), course, places, len(task.train), stop_at, still)
    with tempfile.TemporaryDirectory(prefix="sfo-") as folder, redirect_stderr(io.StringIO()):
        try:
            result = trained(run, task, watch, seed, Path(folder) / "run")
        except Ended as ended:
            return len(task.train), str(ended)
        except TrainingFailed:
            return len(task.train), "diverged"
    if not result.finished:
        raise KeyboardInterrupt  # SIGTERM, which fit() answers by ending early: this is no result
    return len(task.train), "done"


def trained(run: Run, task: Task, tracker: Tracker, seed: int, folder: Path) -> Result:
    """fit() on a task that has been built, without checkpoints on the way."""
    own = {"dir": str(folder), "seed": seed, "checkpoint": Checkpointing(every_s=1e9)}
    return fit(
        task.model,
        task.loss,
        task.train,
        probe=task.probe,
        collate=task.collate,
        growth=run.growth,
        stages=run.stages,
        lr=run.lr,
        budget=run.budget,
        optimizer=run.optimizer,
        engine=run.engine,
        run=run.run.model_copy(update=own),
        trackers=[tracker],
    )


# ── exact measurements ──────────────────────────────────────────────────────────────────────────────────────────


def looking(task: Task, penalty: float, rows: int) -> Callable[[], Reading]:
    """Looks at a task's model: over all training samples as they are, unaugmented, and over those held out."""

    def look() -> Reading:
        gradient, loss = full_gradient(task, penalty, rows)
        norm = math.sqrt(sum(float(part.double().square().sum()) for part in gradient))
        held = held_out(task, rows) if task.test is not None else {}
        return Reading(
            grad_norm=norm,
            loss=loss,
            held_loss=held.get("loss", math.nan),
            accuracy=held.get("accuracy", math.nan),
        )

    return look


def full_gradient(task: Task, penalty: float, rows: int) -> tuple[list[Tensor], float]:
    """∇f of the mean loss plus penalty/2·‖θ‖², and the mean loss; in eval mode, leaving no trace."""
    data = task.train if task.probe is None else task.probe
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    total = [penalty * parameter.detach() for parameter in parameters]
    mean = 0.0
    with evaluating(task.model) as placed:
        for batch, count in evaluation_batches(data, World(), rows, task.collate):
            loss = task.loss(task.model, placed(batch))
            share = count / len(data)
            mean += share * loss.item()
            for whole, part in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                whole.add_(part, alpha=share)
    return total, mean


@torch.no_grad()
def held_out(task: Task, rows: int) -> dict[str, float]:
    """Means of the task's metrics over the held-out samples, in eval mode."""
    assert task.metrics is not None
    means: dict[str, float] = {}
    with evaluating(task.model) as placed:
        for batch, count in evaluation_batches(task.test, World(), rows, task.collate):
            for name, value in task.metrics(task.model, placed(batch)).items():
                means[name] = means.get(name, 0.0) + float(value) * count / len(task.test)
    return means


@contextmanager
def evaluating(model: nn.Module) -> Iterator[Callable[[Any], Any]]:
    """The model in eval mode, and what brings a batch to where it is."""
    was_training, first = model.training, next(model.parameters())
    double = torch.float64 if first.dtype == torch.float64 else None
    model.eval()
    try:
        yield lambda batch: place(batch, first.device, double)
    finally:
        model.train(was_training)
