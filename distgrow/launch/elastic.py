"""Groups of ranks, one after the other, each of the size that its stages want; knows neither torchrun nor Ray."""

from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from distgrow.checkpoint.remote import build_store
from distgrow.config.run import Run
from distgrow.core.errors import RunError, TrainingFailed
from distgrow.core.progress import Progress
from distgrow.run import resize_request
from distgrow.run.folder import RunFolder, storing


def groups(run: Run, folder: RunFolder) -> Iterator[int]:
    """Ranks wanted by the first group and, each time that one has ended and asked for another, by the next.

    TrainingFailed where the size stays: the group's last checkpoint must then be damaged, and would be again and again.
    """
    size = wanted(run, folder)
    yield size
    while run.launch.elastic and resize_request.take(folder) and not folder.stop.exists():
        before, size = size, wanted(run, folder)
        if size == before:
            raise TrainingFailed(
                f"{before} workers ended their stage, but the newest intact checkpoint in {folder.checkpoints} is of "
                f"a stage that wants {size} again; look at the disk, then go on with --resume"
            )
        yield size


def wanted(run: Run, folder: RunFolder) -> int:
    """Ranks that the stage of the newest intact checkpoint wants, the first stage where there is none yet.

    The group resumes from the same checkpoint; so it never begins with another size than its stage wants.
    """
    from distgrow.checkpoint import writer  # loads torch

    controller, progress = run.controller(), Progress()
    store = build_store(folder, run.launch.storage_path)
    if run.launch.elastic and store.names():
        _, progress, _ = writer.newest(store)
    return controller.ranks(controller.advance(progress).stage)


@contextmanager
def launching(folder: RunFolder) -> Iterator[None]:
    """Nobody else starts groups of this run meanwhile, also not between two of them, when no rank holds the folder."""
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
        lock.release()
