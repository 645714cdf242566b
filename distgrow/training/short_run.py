"""Short runs of a copy of a task's model, of which nothing is kept but their events: branches, and tests of rates."""

import copy
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from distgrow.checkpoint.spec import Checkpointing
from distgrow.checkpoint.storage import Folder
from distgrow.core.errors import Diverged, TrainingFailed
from distgrow.core.probe_schedule import Probing
from distgrow.data.seeding import seed_generators
from distgrow.distributed.world import World
from distgrow.engine.protocol import Engine
from distgrow.growth.controller import Controller
from distgrow.run.folder import RunFolder, storing
from distgrow.run.stop import StopRequests
from distgrow.tasks.task import Task
from distgrow.tracking.base import NullTracker
from distgrow.tracking.base_event import Line
from distgrow.training.result import Result
from distgrow.training.settings import Settings
from distgrow.training.spec import Evaluation, RunSpec
from distgrow.training.trainer import Trainer

#: The training loss of a short run is the mean over this share of its samples, the last ones.
WINDOW = 0.25


class Stopped(TrainingFailed):
    """A short run was stopped on request, on every rank."""


class ReadOnlyFolder(Folder):
    """Read checkpoints from a folder, and discard new ones: nothing of a branch but its losses is kept."""

    def begin(self, name: str) -> str:
        """Return the name. Nothing is created."""
        return name

    def write(self, place: str, file: str, data: bytes) -> None:
        """Discard the file."""

    def commit(self, place: str, name: str, manifest: bytes) -> None:
        """Discard the checkpoint."""

    def delete(self, name: str) -> None:
        """Do nothing: the checkpoint stays for the next branch."""

    def sweep(self) -> None:
        """Do nothing: no write leaves files."""


class Recorder:
    """Keep the events of a branch's updates, and its last event."""

    def __init__(self) -> None:
        self.updates: list[Line] = []
        self.last: Line = {}

    def log(self, event: Line) -> None:
        """Keep the event."""
        self.last = event
        if event["event"] in ("step", "skip"):
            self.updates.append(event)

    def close(self) -> None:
        """Do nothing."""


@contextmanager
def scratch(parent: Path, prefix: str, world: World) -> Iterator[RunFolder]:
    """Make a run's folder inside of another that is gone afterwards. Collective: every rank must call."""

    def make() -> str:
        with storing(parent):
            parent.mkdir(parents=True, exist_ok=True)
            return tempfile.mkdtemp(prefix=prefix, dir=parent)

    folder = RunFolder(world.on_rank0(make))
    try:
        yield folder
    finally:
        if world.rank == 0:
            shutil.rmtree(folder.path, ignore_errors=True)


def remove_scratch(parent: Path, prefix: str) -> None:
    """Remove what a killed process has left of `scratch`. Nobody else may be using it: the run's folder is locked."""
    for left in parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)


def trained(
    settings: Settings,
    controller: Controller,
    task: Task,
    folder: RunFolder,
    world: World,
    *,
    begin: bool = False,
    stop: StopRequests | None = None,
) -> tuple[Recorder, Result | None]:
    """Train a copy of the task's model, and keep nothing of it but its events. Collective: every rank must call.

    Args:
        settings: What is not decided by `controller`.
        controller: The decisions.
        task: Model, loss and data.
        folder: A folder that holds the checkpoint to go on from, if any.
        world: The ranks.
        begin: True: from the first sample. False: from the checkpoint.
        stop: Who hears requests to stop. None: this run alone does, while it lasts.

    Returns:
        The events on rank 0, and the result; None if training diverged.

    Raises:
        Stopped: It was stopped on request.
    """
    seed_generators(settings.run.seed)
    engine, recorder = _engine(settings, task, world), Recorder()
    track, heard = recorder if world.rank == 0 else NullTracker(), stop or StopRequests(folder)
    run, store = _short(settings.run, folder), ReadOnlyFolder(folder.checkpoints)
    trainer = Trainer(task, controller, engine, track, folder, run, world, heard, store)
    try:
        if stop is not None:
            result = _made(trainer, begin)
        else:
            with heard.watched():
                result = _made(trainer, begin)
    except Diverged:
        result = None
    trainer.events.write()
    if result is not None and not result.finished:
        raise Stopped("stopped on request; nothing was written")
    return recorder, result


def _engine(settings: Settings, task: Task, world: World) -> Engine:
    """Return an engine over copies of model and loss, and of an optimizer that is built over their parameters."""
    memo: dict[int, Any] = {}
    model = copy.deepcopy(task.model, memo)
    loss = copy.deepcopy(task.loss, memo) if isinstance(task.loss, nn.Module) else task.loss
    return settings.engine.build(
        model,
        loss,
        metrics=task.metrics,
        optimizer=settings.optimizer.copied(memo),
        world=world,
        items=task.items,
        extrapolate=settings.extrapolate,
        sparsity=settings.sparsity,
    )


def _made(trainer: Trainer, begin: bool) -> Result:
    return trainer.begin(measure=False) if begin else trainer.resume(measure=False)


def _short(spec: RunSpec, folder: RunFolder) -> RunSpec:
    """Return the settings of a short run: no checkpoints, no probes, one evaluation at the end, every update logged."""
    never = {"checkpoint": Checkpointing(every_s=1e9), "probe": Probing(), "log_every": 1}
    evaluation = Evaluation(every_epochs=1e9, rows=spec.eval.rows)
    return spec.model_copy(update={"dir": str(folder.path), "eval": evaluation, **never})


def smooth(curve: Sequence[tuple[int, float]], at: NDArray[np.float64], window: float) -> NDArray[np.float64]:
    """Return the mean loss per sample over the last `window` samples before each position of `at`.

    Near the beginning there are fewer. All branches draw the same samples, so means over the same window are of the
    same samples, and only the parameters differ. A mean over a number of updates would be of other samples for every
    batch.

    Args:
        curve: (samples since the checkpoint, batch loss) after each update.
        at: Positions, in samples since the checkpoint.
        window: Length of the mean, in samples.
    """
    ends = np.array([0, *(samples for samples, _ in curve)], dtype=float)
    losses = np.array([loss for _, loss in curve])
    total = np.concatenate([[0.0], np.cumsum(losses * np.diff(ends))])
    begins = np.maximum(0.0, at - window)
    return (np.interp(at, ends, total) - np.interp(begins, ends, total)) / (at - begins)


def last_loss(curve: Sequence[tuple[int, float]], window: float = WINDOW) -> float:
    """Return the mean training loss over the last part of a run's samples, or inf if a loss is not finite."""
    if not curve or not all(math.isfinite(loss) for _, loss in curve):
        return math.inf
    samples = curve[-1][0]
    return float(smooth(curve, np.array([float(samples)]), window * samples)[0])
