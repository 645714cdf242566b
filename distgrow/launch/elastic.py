"""Elastic launch: groups of ranks in sequence, each as large as its stages want. Knows neither torchrun nor Ray."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from distgrow.checkpoint.remote import build_store
from distgrow.core.counted import counted
from distgrow.core.errors import RunError, TrainingFailed
from distgrow.core.progress import Progress
from distgrow.launch.base import Job
from distgrow.run import resize_request
from distgrow.run.folder import RunFolder, storing


def groups(job: Job, folder: RunFolder) -> Iterator[int]:
    """Yield the number of ranks of the first group, and then of each group that follows.

    A group follows if the one before has ended and asked for another size.

    Raises:
        TrainingFailed: if the size stays the same. The group's last checkpoint must be damaged then.
    """
    size = wanted(job, folder)
    yield size
    while job.launch.elastic and resize_request.take(folder) and not folder.stop.exists():
        before, size = size, wanted(job, folder)
        if size == before:
            raise TrainingFailed(
                f"{counted(before, 'worker')} ended their stage, but the newest intact checkpoint in "
                f"{folder.checkpoints} is of a stage that wants {size} again; look at the disk, then go on with "
                "--resume"
            )
        yield size


def wanted(job: Job, folder: RunFolder) -> int:
    """Return the number of ranks for the stage of the newest intact checkpoint, or for the first stage without one.

    The group resumes from the same checkpoint, so it always starts with the size that its stage wants.
    """
    from distgrow.checkpoint import writer  # loads torch

    controller, progress = job.controller(), Progress()
    store = build_store(folder, job.launch.storage_path)
    if job.launch.elastic and store.names():
        _, progress, _ = writer.newest(store)
    return controller.ranks(controller.advance(progress).stage)


@contextmanager
def launching(folder: RunFolder) -> Iterator[None]:
    """Keep other launchers of this run out while the context lasts.

    This also holds between two groups, when no rank has the folder locked.
    """
    lock = FileLock(folder.path / ".launching")
    with storing(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"run.dir={folder.path} is being trained by another command; wait for it or choose another run.dir"
            ) from None
    try:
        resize_request.forget(folder)
        yield
    finally:
        if [file.name for file in folder.path.iterdir()] == [Path(lock.lock_file).name]:
            Path(lock.lock_file).unlink()  # no run has begun
            folder.path.rmdir()
        lock.release()
