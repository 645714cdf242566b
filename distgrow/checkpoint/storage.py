"""Storage of checkpoints: the protocol, and its implementation in a shared folder. Knows no torch.

A checkpoint is a named folder of files. It is written under a hidden name and appears in one step. A file system
renames the folder. An object store cannot rename, so it receives the manifest last.
"""

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from distgrow.run.folder import RunFolder, storing
from distgrow.run.resume_mode import ResumeMode

T = TypeVar("T")
MANIFEST = "manifest.json"
#: A checkpoint's step. A later checkpoint of the same step, with more skipped updates, has a number after it.
NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")
#: Errors of a network file system that may pass.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ECONNRESET, errno.EHOSTDOWN}
ATTEMPTS, PAUSE_S = 4, 1.0


class Store(Protocol):
    """Keep files in named folders. Each folder appears as a whole or not at all."""

    where: str
    """The place of the checkpoints, for messages."""

    def begin(self, name: str) -> str:
        """Return a hidden place for the files of checkpoint `name`. All ranks write there."""
        ...

    def write(self, place: str, file: str, data: bytes) -> None:
        """Write one file. The file is durable when this returns."""
        ...

    def commit(self, place: str, name: str, manifest: bytes) -> None:
        """Turn the files at `place` into the checkpoint `name`."""
        ...

    def names(self) -> list[str]:
        """Return the names of all checkpoints, the oldest first."""
        ...

    def delete(self, name: str) -> None:
        """Delete a checkpoint, or the files at a hidden place."""
        ...

    def sweep(self) -> None:
        """Delete the files of writes that were killed."""
        ...

    def fetch(self, name: str) -> Path:
        """Return a folder on this host that holds the checkpoint. Several ranks of a host may call this at once."""
        ...

    def push(self, folder: RunFolder) -> None:
        """Copy the run's config and metrics beside the checkpoints if the storage is not the run's folder."""
        ...

    def pull(self, folder: RunFolder, *, resume: ResumeMode) -> None:
        """Copy config and metrics back to a host that lacks them.

        Raises:
            RunError: The storage holds another run.
        """
        ...


def at(name: str) -> tuple[int, int]:
    """Return the sort key of a checkpoint's name: its step, and its number among checkpoints of the same step."""
    match = NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1]), int(match[2] or 0)


def free_name(step: int, taken: Sequence[str]) -> str:
    """Return a name for a new checkpoint of `step` that is not in `taken`."""
    again = [at(name)[1] for name in taken if at(name)[0] == step]
    return f"step-{step:08d}" + (f".{max(again) + 1}" if again else "")


def persistently(action: Callable[[], T]) -> T:
    """Return the result of `action`. Retry a few times if the storage fails in a way that may pass.

    Raises:
        OSError: The failure is of another kind, or the last attempt failed.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return action()
        except OSError as error:
            if error.errno is not None and error.errno not in _PASSING:
                raise
            time.sleep(PAUSE_S * attempt)
    return action()


class Folder:
    """Keep checkpoints in a folder that every rank can read: a local disk, NFS, Lustre."""

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, str(path)

    def begin(self, name: str) -> str:
        """See Store."""
        del name
        place = f".partial-{uuid.uuid4().hex[:8]}"
        with storing(self.path):
            persistently(lambda: (self.path / place).mkdir(parents=True))
        return place

    def write(self, place: str, file: str, data: bytes) -> None:
        """See Store."""
        path = self.path / place / file

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())

        with storing(self.path):
            persistently(write)

    def commit(self, place: str, name: str, manifest: bytes) -> None:
        """See Store."""
        self.write(place, MANIFEST, manifest)
        partial = self.path / place
        with storing(self.path):
            for folder in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
                persistently(lambda folder=folder: _flush(folder))
            persistently(lambda: partial.rename(self.path / name))
            persistently(lambda: _flush(self.path))

    def names(self) -> list[str]:
        """See Store."""
        return sorted((path.name for path in self.path.glob("step-*") if NAME.fullmatch(path.name)), key=at)

    def delete(self, name: str) -> None:
        """See Store."""
        hidden = self.path / (name if name.startswith(".") else f".partial-{name}")
        if hidden.name != name:
            shutil.rmtree(hidden, ignore_errors=True)
            (self.path / name).rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def sweep(self) -> None:
        """See Store."""
        for partial in self.path.glob(".partial-*"):
            self.delete(partial.name)

    def fetch(self, name: str) -> Path:
        """See Store."""
        return self.path / name

    def push(self, folder: RunFolder) -> None:
        """Do nothing: config and metrics are in the same folder."""

    def pull(self, folder: RunFolder, *, resume: ResumeMode) -> None:
        """Do nothing: config and metrics are in the same folder."""


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
